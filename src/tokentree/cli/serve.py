"""The command that serves a model."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tokentree.cli.options import (
    CompileOption,
    DeviceOption,
    DrafterOption,
    DraftOption,
    DtypeOption,
    EngineOption,
    HeadsOption,
    MemoryOption,
    ModelOption,
    QuantizationOption,
    ShapeOption,
    ThreadsOption,
    check_folder,
    check_loading,
    keys_of,
    made,
    name_of,
)
from tokentree.errors import OptionError

LIMITS, ACCESS, SCALE = "Limits", "Access", "Replicas"  # headings of the help
ROUTINGS = ("beginning", "balanced")
PARSERS = ("auto", "hermes", "llama3")
LEVELS = ("debug", "info", "warning", "error")


def serve(
    model: ModelOption,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0: all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0: any free one.")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="What requests call the model; default: the end of its name.")
    ] = None,
    generation_config: Annotated[
        str,
        typer.Option(help="auto: the model's generation_config.json gives defaults for sampling; none: it doesn't."),
    ] = "auto",
    tool_parser: Annotated[
        str, typer.Option(help="How the model calls tools: auto (as its chat template says), hermes or llama3.")
    ] = "auto",
    log_level: Annotated[str, typer.Option(help=f"{', '.join(LEVELS)}.")] = "info",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log prompts and texts, at info.")] = False,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that requests have to end, once the server is told to.")
    ] = 30.0,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="A key that requests must show; may be repeated.", rich_help_panel=ACCESS),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with such keys, one on a line.", rich_help_panel=ACCESS)
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Web pages from this origin may use the server; may be repeated; default: none.",
            rich_help_panel=ACCESS,
        ),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, help="The most texts that are decoded together.", rich_help_panel=LIMITS)
    ] = 8,
    max_queue: Annotated[
        int, typer.Option(min=0, help="The most texts that wait; more get the status 429.", rich_help_panel=LIMITS)
    ] = 64,
    request_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds after which a request ends; 0: never.", rich_help_panel=LIMITS)
    ] = 600.0,
    max_tokens_limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="The most new tokens of a text; default: as the context holds.", rich_help_panel=LIMITS
        ),
    ] = None,
    kv_mb: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Megabytes for the KV of texts; default: half of the memory, nine tenths of a GPU's.",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    prefix_mb: Annotated[
        int, typer.Option(min=0, help="Megabytes for the KV of finished texts.", rich_help_panel=LIMITS)
    ] = 256,
    lookup_mb: Annotated[
        int,
        typer.Option(min=0, help="Megabytes for what look-ups learn, for each way to draft.", rich_help_panel=LIMITS),
    ] = 512,
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1, help="Serve by so many processes, on Ray Serve; default: by this one.", rich_help_panel=SCALE
        ),
    ] = None,
    max_replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Start more where many requests wait, up to so many.", rich_help_panel=SCALE),
    ] = None,
    target_requests: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Requests that each should have then, waiting ones too; default: max-batch.",
            rich_help_panel=SCALE,
        ),
    ] = None,
    replica_cpus: Annotated[
        float, typer.Option(min=0, help="CPUs of a replica; also its threads.", rich_help_panel=SCALE)
    ] = 1.0,
    replica_gpus: Annotated[
        float, typer.Option(min=0, help="GPUs of a replica; 0.5: half of one.", rich_help_panel=SCALE)
    ] = 0.0,
    routing: Annotated[
        str,
        typer.Option(
            help=f"{ROUTINGS[0]}: a request goes where its beginning was read; {ROUTINGS[1]}: by load alone.",
            rich_help_panel=SCALE,
        ),
    ] = ROUTINGS[0],
    stuck_timeout: Annotated[
        float,
        typer.Option(
            min=1,
            help="Seconds without a step after which a replica with requests is replaced.",
            rich_help_panel=SCALE,
        ),
    ] = 120.0,
    memory_seconds: Annotated[
        float,
        typer.Option(min=1, help="Seconds between two exchanges of what lookups learnt.", rich_help_panel=SCALE),
    ] = 60.0,
    draft_model: DraftOption = None,
    heads: HeadsOption = None,
    drafter: DrafterOption = None,
    shape: ShapeOption = None,
    memory: MemoryOption = None,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    compile: CompileOption = False,
    device: DeviceOption = None,
    engine: EngineOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Serve a model over HTTP, with OpenAI's interface."""
    try:
        import uvicorn  # noqa: F401

        from tokentree.serve.allocator import keep_memory_level
        from tokentree.serve.run import listen, log_to_stderr
        from tokentree.serve.run import serve as run
    except ModuleNotFoundError as error:
        raise OptionError(f"serving needs {error.name}: pip install 'tokentree[serve]'") from None
    from tokentree.serve.defaults import defaults_of
    from tokentree.serve.settings import Settings

    _check_words(log_level, generation_config, tool_parser, routing)
    if replicas is not None:
        _serve_replicas(
            host, port, model=model, served_model_name=served_model_name, generation_config=generation_config,
            tool_parser=tool_parser, log_level=log_level, log_prompts=log_prompts, drain_timeout=drain_timeout,
            api_key=keys_of(api_key, api_key_file), cors_origin=cors_origin or (), max_batch=max_batch,
            max_queue=max_queue, request_timeout=request_timeout, max_tokens_limit=max_tokens_limit, kv_mb=kv_mb,
            prefix_mb=prefix_mb, lookup_mb=lookup_mb, replicas=replicas, max_replicas=max_replicas,
            target_requests=target_requests, cpus=replica_cpus, gpus=replica_gpus, routing=routing,
            stuck_timeout=stuck_timeout, memory_seconds=memory_seconds, draft_model=draft_model or (),
            heads=_text(heads), drafter=drafter, shape=shape, memory=_text(memory), dtype=dtype,
            quantization=quantization, compile=compile, device=device, engine=engine, threads=threads,
        )  # fmt: skip
        return
    if max_replicas is not None or target_requests is not None:
        raise OptionError("--max-replicas and --target-requests are for replicas: give --replicas too")
    keys = keys_of(api_key, api_key_file)
    if memory is not None:
        check_folder(memory)
    options: dict[str, Any] = {
        "draft_model": draft_model, "heads": heads, "shape": shape, "dtype": dtype, "quantization": quantization,
        "compile": compile, "device": device, "engine": engine, "memory": memory, "max_batch": max_batch,
        "kv_mb": kv_mb, "prefix_mb": prefix_mb, "lookup_mb": lookup_mb,
    }  # fmt: skip
    check_loading(model, drafter, **options)
    settings = Settings(
        model_name=served_model_name or name_of(model).removesuffix(".gguf"), keys=keys, max_batch=max_batch,
        max_queue=max_queue, request_timeout=request_timeout or None, max_tokens=max_tokens_limit,
        cors_origins=tuple(cors_origin or ()), log_prompts=log_prompts,
        tool_parser=tool_parser,
        defaults=defaults_of(model) if generation_config == "auto" else {},
    )  # fmt: skip
    sock = listen(host, port)
    log_to_stderr(log_level)
    keep_memory_level()
    llm = run(settings, lambda: made(model, drafter, threads, **options), sock, drain_timeout)
    if llm is None:  # the thread that loads can't be ended otherwise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    if memory is not None:
        llm.save_memory(memory)


def _serve_replicas(host: str, port: int, **given: Any) -> None:
    """Serves by replicas on this machine.

    Raises:
        OptionError, ModelError, PairingError: if an argument is wrong, or no replica can be made.
    """
    from tokentree.scale.arguments import arguments_of
    from tokentree.serve.run import log_to_stderr

    arguments = arguments_of(given)
    try:
        from tokentree.scale.local import serve as run
    except ModuleNotFoundError as error:
        raise OptionError(f"replicas need {error.name}: pip install 'tokentree[scale]'") from None
    log_to_stderr(arguments.log_level)
    run(arguments, host, port)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _check_words(log_level: str, generation_config: str, tool_parser: str, routing: str) -> None:
    if log_level not in LEVELS:
        raise OptionError(f"--log-level {log_level!r} is not one of {', '.join(LEVELS)}")
    if generation_config not in ("auto", "none"):
        raise OptionError(f"--generation-config {generation_config!r} is neither auto nor none")
    if tool_parser not in PARSERS:
        raise OptionError(f"--tool-parser {tool_parser!r} is not one of {', '.join(PARSERS)}")
    if routing not in ROUTINGS:
        raise OptionError(f"--routing {routing!r} is neither {ROUTINGS[0]} nor {ROUTINGS[1]}")
