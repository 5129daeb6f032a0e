"""What an application of replicas is told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokentree.errors import OptionError
from tokentree.llm import LLM
from tokentree.serve.settings import Settings


class Arguments(BaseModel):
    """The arguments of ``tokentree.scale:app``. Those that ``tokentree serve`` has too mean the same there.

    Attributes:
        replicas: how many there are; with ``max_replicas``, the fewest.
        max_replicas: the most. Between both Serve starts and ends some, by the number of requests.
        target_requests: how many requests a replica should have then, waiting ones included; by default
            ``max_batch``.
        cpus, gpus: the share of each replica; 0.5 GPUs are half of one.
        routing: ``beginning`` (a request goes where its beginning was read) or ``balanced`` (Serve's own choice of
            two).
        stuck_timeout: seconds without a step after which a replica that has requests is replaced.
        memory_seconds: the seconds between two exchanges of what look-ups learnt.
        fronts: how many processes let requests in.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    served_model_name: str | None = None
    draft_model: tuple[str, ...] = ()
    heads: str | None = None
    drafter: str | None = None
    shape: str | None = None
    memory: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    compile: bool = False
    device: str | None = None
    engine: str | None = None
    threads: int | None = Field(None, ge=1)
    kv_mb: float | None = Field(None, ge=0)
    prefix_mb: int = Field(256, ge=0)
    lookup_mb: int = Field(512, ge=0)

    api_key: tuple[str, ...] = ()
    api_key_file: str | None = None
    cors_origin: tuple[str, ...] = ()
    max_batch: int = Field(8, ge=1)
    max_queue: int = Field(64, ge=0)
    request_timeout: float = Field(600, ge=0)
    max_tokens_limit: int | None = Field(None, ge=1)
    generation_config: Literal["auto", "none"] = "auto"
    tool_parser: Literal["auto", "hermes", "llama3"] = "auto"
    log_prompts: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    target_requests: float | None = Field(None, gt=0)
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)
    routing: Literal["beginning", "balanced"] = "beginning"
    drain_timeout: float = Field(30, ge=0)
    stuck_timeout: float = Field(120, gt=0)
    memory_seconds: float = Field(60, gt=0)
    fronts: int = Field(1, ge=1)

    def settings(self) -> Settings:
        """Those of each replica's server, and of what stands before them.

        Raises:
            OptionError: if there are no keys in the file that should have some.
            ModelError: if ``model`` is nothing that a model can be in.
        """
        from tokentree.cli.options import keys_of, name_of
        from tokentree.serve.defaults import defaults_of

        return Settings(
            model_name=self.served_model_name or name_of(self.model).removesuffix(".gguf"),
            keys=keys_of(list(self.api_key), None if self.api_key_file is None else Path(self.api_key_file)),
            max_batch=self.max_batch, max_queue=self.max_queue, request_timeout=self.request_timeout or None,
            max_tokens=self.max_tokens_limit, cors_origins=self.cors_origin, log_prompts=self.log_prompts,
            tool_parser=self.tool_parser,
            defaults=defaults_of(self.model) if self.generation_config == "auto" else {},
        )  # fmt: skip

    def check(self) -> None:
        """Tells before anything is loaded what an `LLM` would refuse.

        Raises:
            OptionError, ModelError, PairingError: as `LLM`.
        """
        from tokentree.cli.options import check_folder, check_loading

        if self.memory is not None:
            check_folder(Path(self.memory))
        check_loading(self.model, self.drafter, **self._options())

    def load(self) -> LLM:
        """The model.

        Raises:
            OptionError, ModelError, PairingError: as `LLM`.
        """
        from tokentree.cli.options import made

        threads = self.threads or max(1, int(self.cpus))
        return made(self.model, self.drafter, threads, **self._options())

    def _options(self) -> dict[str, Any]:
        names = ("shape", "dtype", "quantization", "compile", "device", "engine", "memory", "max_batch", "kv_mb")
        options = {name: getattr(self, name) for name in (*names, "prefix_mb", "lookup_mb")}
        heads = None if self.heads is None else Path(self.heads)
        return options | {"draft_model": list(self.draft_model), "heads": heads}


def arguments_of(given: Mapping[str, Any]) -> Arguments:
    """``given``, checked.

    Raises:
        OptionError, ModelError, PairingError: if one is wrong.
    """
    try:
        found = Arguments.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        name, said = ".".join(map(str, first["loc"])), first["msg"]
        known = ", ".join(Arguments.model_fields)
        if first["type"] == "extra_forbidden":
            raise OptionError(f"the application has no argument {name!r}: it takes {known}") from None
        raise OptionError(f"the argument {name!r} of the application: {said[:1].lower() + said[1:]}") from None
    if found.max_replicas is not None and found.max_replicas < found.replicas:
        raise OptionError(f"max_replicas={found.max_replicas} is below replicas={found.replicas}")
    if found.target_requests is not None and found.max_replicas is None:
        raise OptionError("target_requests needs max_replicas: without it the number of replicas stays as it is")
    found.check()
    return found
