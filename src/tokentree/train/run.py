"""Training Medusa heads, from a model's name to a folder that `LLM` reads."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

from tokentree.cache import replacing
from tokentree.errors import OptionError
from tokentree.heads.fingerprint import Fingerprint
from tokentree.heads.medusa import MedusaHeads
from tokentree.heads.saved import About, read_heads, write_heads
from tokentree.llm import LLM
from tokentree.loading import load_model, pick_device
from tokentree.shapes.optimal import find_choices
from tokentree.train.features import read_parts
from tokentree.train.job import (
    check,
    check_folder,
    check_parameters,
    claimed,
    leading,
    phases_on,
    publish,
    training_in,
    watch_with,
)
from tokentree.train.keeping import whole, writing
from tokentree.train.looks import table
from tokentree.train.loop import CHECKPOINT, Figures, Recipe, train
from tokentree.train.medusa import HeadsWithLoss, MedusaTask, frequent_tokens
from tokentree.train.progress import Phases
from tokentree.train.start import check_equal, go_on_from, said_of
from tokentree.train.target import attention_for, engine_of
from tokentree.train.texts import Texts

CHOICES = 64  # nodes of the static tree that is kept beside the heads


@dataclass(frozen=True)
class Trained:
    """What came of it.

    Args:
        folder: with the heads.
        figures: of the heads, on what was held back.
        texts: that they were trained on.
    """

    folder: Path
    figures: Figures
    texts: Texts


def train_medusa(
    llm: LLM, base_model: str, data: str | Path, folder: str | Path, recipe: Recipe | None = None, *,
    num_heads: int = 3, num_layers: int = 1, known_tokens: int = 16384, start: str | Path | None = None,
    tokens: int = 1_000_000, held_back: float = 0.05, work: str | Path | None = None,
    console: Console | None = None, command: str = "", force: bool = False, stop_after: int | None = None,
) -> Trained:  # fmt: skip
    """Trains Medusa heads on ``llm``, which stays as it is (Medusa-1), and writes them into ``folder``.

    The heads share the model's output layer. What is finished is kept: after an interruption, the same call goes on
    from there.

    Args:
        base_model: the name that the heads will say they belong to.
        data: a file of texts, see `read_texts`; or ``self``: the model writes its own, see `write_texts`.
        known_tokens: how many of the model's tokens the heads know, the most frequent ones of the texts. Fewer are
            faster to train and to draft with; heads never propose the others.
        start: a folder with heads of the same making, which are trained further; which tokens they know stays.
        tokens: how many the model writes with ``data="self"``.
        held_back: the share of tokens that accuracies are measured on.
        work: a folder for the texts and the model's hidden states, which trainings of several heads can share; by
            default ``folder/work``, where checkpoints are too.
        console: shows progress; by default on standard error, if that is a terminal.
        command: what was typed, for the model card.
        force: begin anew where ``folder`` has a training with other settings, and replace what is there.

    Raises:
        OptionError, PromptError, PairingError: if a number makes no sense, the data is no data, the model's engine has
            no hidden states, a folder can't be written into, or it belongs to another training.
    """
    recipe, folder = recipe or Recipe(), Path(folder)
    check(llm, held_back, known_tokens=known_tokens, tokens=tokens, num_heads=num_heads)
    size = engine_of(llm).capture().hidden_size
    _check_heads(num_heads, num_layers, size, llm.engine.context)
    heads = MedusaHeads(num_heads, num_layers, size)
    settings = {"method": "medusa", "num_heads": num_heads, "num_layers": num_layers, "known_tokens": known_tokens}
    settings |= {"data": str(data), "tokens": tokens if str(data) == "self" else None, "held_back": held_back}
    settings |= said_of(start)
    begun = None if start is None else _begun(llm, start, heads, min(known_tokens, llm.engine.vocab_size))
    with phases_on(console) as phases:
        with claimed(llm, data, folder, settings, recipe, work, tokens, 1, force, phases) as (own, shared, texts):
            heads.token_map = frequent_tokens(texts.ids, known_tokens, llm.engine.vocab_size)
            if begun is not None:
                heads.token_map = begun.token_map
            started = go_on_from(begun, heads)
            model, task = _prepared(llm, heads, texts, shared / "hidden", held_back, phases)
        groups = [{"params": list(heads.parameters())}]
        watch, about = watch_with(phases, own), _identity(heads, texts) | started
        told = recipe.model_dump() | {"data": str(data), "texts": len(texts.ids), "tokens": texts.tokens}
        told |= said_of(start)
        with training_in(own, phases):
            figures = train(model, groups, task, recipe, own, watch, about, stop_after, phases, begun is not None)
            with leading() as lead:
                if lead:
                    _write(llm, model, task, folder, base_model, told, command, phases)
    return Trained(folder, figures, texts)


def _begun(llm: LLM, start: str | Path, heads: MedusaHeads, known: int) -> MedusaHeads:
    """The heads in the folder ``start``, made as ``heads``, which know so many tokens."""
    begun = read_heads(start, Fingerprint.of(llm.config, llm.tokenizer)).heads.float()
    count = llm.engine.vocab_size if begun.token_map is None else len(begun.token_map)
    check_equal(start, _sizes(begun) | {"known tokens": count}, _sizes(heads) | {"known tokens": known})
    return begun


def _sizes(heads: MedusaHeads) -> dict[str, Any]:
    own = None if heads.projection is None else list(heads.projection.shape)
    return {
        "num_heads": heads.num_heads, "num_layers": heads.num_layers, "hidden_size": heads.hidden_size,
        "biases": heads.bias is not None, "projections of their own": own,
    }  # fmt: skip


def _check_heads(num_heads: int, num_layers: int, size: int, context: int) -> None:
    """Raises `OptionError` if a text has no place for what so many heads look at, or a machine no memory for them."""
    if num_heads + 2 > context:
        raise OptionError(f"{num_heads} heads look farther ahead than a text of this model has tokens ({context})")
    check_parameters(num_heads * num_layers * size**2)


def train_medusa2(
    base_model: str, data: str | Path, folder: str | Path, recipe: Recipe | None = None, *, way: str = "lora",
    start: str | Path | None = None, num_heads: int = 3, num_layers: int = 1, known_tokens: int = 16384,
    tokens: int = 1_000_000, max_tokens: int = 512, held_back: float = 0.05, batch: int = 16,
    dtype: str | None = None, device: str | None = None, console: Console | None = None, command: str = "",
    force: bool = False,
) -> Trained:  # fmt: skip
    """Trains a model and Medusa heads together (Medusa-2). The changed model is written into ``folder/model``, and
    heads for it into ``folder/heads``: the pair is lossless to the changed model, which is another one than
    ``base_model``.

    Args:
        base_model: a hub name, a folder or a GGUF file.
        way: ``lora`` or ``full``, see `ModelWithHeads`.
        start: a folder of heads to start from, such as `train_medusa` wrote: the paper trains heads alone first.
        max_tokens: what a text has beyond these is left out.
        data, known_tokens, tokens, held_back, console, command, force: as for `train_medusa`.

    Raises:
        OptionError, PromptError, ModelError: as for `train_medusa`.
    """
    from tokentree.train.medusa2 import ModelWithHeads, TextTask, check_way

    check_way(way)
    recipe, folder = recipe or Recipe(), Path(folder)
    settings = {"method": f"medusa, {way}", "num_heads": num_heads, "num_layers": num_layers, "data": str(data)}
    settings |= {"tokens": tokens if str(data) == "self" else None, "max_tokens": max_tokens, "held_back": held_back}
    with phases_on(console) as phases:
        with phases.phase("loading the model"):
            llm = LLM(base_model, max_batch=batch, dtype=dtype, device=device, attention=attention_for(device))
        check(llm, held_back, known_tokens=known_tokens, tokens=tokens, num_heads=num_heads, max_tokens=max_tokens)
        assert llm.tokenizer is not None
        tokenizer, size = llm.tokenizer, engine_of(llm).capture().hidden_size
        _check_heads(num_heads, num_layers, size, llm.engine.context)
        heads = MedusaHeads(num_heads, num_layers, size)
        if start is not None:
            heads = read_heads(start, Fingerprint.of(llm.config, tokenizer)).heads.float()
        heads.token_map = None
        for part in ("model", "heads"):
            check_folder(folder / part, force or (folder / "work" / CHECKPOINT).is_file())
        with claimed(llm, data, folder, settings, recipe, None, tokens, 0, force, phases) as (work, _, texts):
            pass
        del llm
        with phases.phase("loading the model to train it"):
            model = ModelWithHeads(load_model(base_model, dtype or "float32", pick_device(device)), heads, way)
        task = TextTask([ids[:max_tokens] for ids in texts.ids], held_back)
        identity, watch = _identity(heads, texts) | {"way": way}, watch_with(phases, work)
        figures = train(model, model.groups(), task, recipe, work, watch, identity, phases=phases)
        told = recipe.model_dump() | {"way": way, "data": str(data), "texts": len(texts.ids), "tokens": texts.tokens}
        with leading() as lead:
            if lead:
                merged = model.merged()
                with phases.phase("saving the model"), whole(), writing(folder), replacing(folder / "model") as new:
                    merged.save_pretrained(new)
                    tokenizer.save_pretrained(new)
                with phases.phase("loading the changed model"):
                    changed = LLM(folder / "model", dtype=dtype, device=device, attention=attention_for(device))
                heads.token_map = frequent_tokens(texts.ids, known_tokens, changed.engine.vocab_size)
                some = Texts(texts.texts[-max(2, len(texts.ids) // 20) :])
                # of this model, which training again changes: they are not kept
                with TemporaryDirectory(dir=work) as room:
                    seen = _prepared(changed, heads, some, Path(room), 0.9, phases)
                name = f"{base_model}, trained with these heads"
                _write(changed, *seen, folder / "heads", name, told, command, phases)
    return Trained(folder, figures, texts)


def _identity(heads: MedusaHeads, texts: Texts) -> dict[str, Any]:
    """What a checkpoint belongs to beside its recipe."""
    known = None if heads.token_map is None else len(heads.token_map)
    return {"heads": [heads.num_heads, heads.num_layers, heads.hidden_size, known], "texts": texts.digest}


def _prepared(
    llm: LLM, heads: MedusaHeads, texts: Texts, folder: Path, held_back: float, phases: Phases
) -> tuple[HeadsWithLoss, MedusaTask]:
    """Heads with the output layer that they share, and their task, for which ``llm`` reads ``texts``."""
    features, vocab_size = engine_of(llm).capture(), llm.engine.vocab_size
    part, rest = read_parts(engine_of(llm), texts, folder, [features.num_layers], held_back, phases)
    known = torch.arange(vocab_size) if heads.token_map is None else heads.token_map
    weight, bias = features.output_weights(known.to(features.device))
    model = HeadsWithLoss(heads, weight.float(), None if bias is None else bias.float())
    return model, MedusaTask(part, rest, heads.num_heads, vocab_size, heads.token_map)


def _write(
    llm: LLM, model: HeadsWithLoss, task: MedusaTask, folder: Path, base_model: str, recipe: dict[str, Any],
    command: str, phases: Phases,
) -> None:  # fmt: skip
    """Measures the heads on what was held back, and writes them with a model card."""
    with phases.phase("measuring the heads"):
        accuracies, temperatures = task.accuracies(model), task.temperatures(model)
        _, figures = task.evaluate(model)
        choices = find_choices(accuracies, CHOICES)
    about = About(
        fingerprint=Fingerprint.of(llm.config, llm.tokenizer),
        temperatures=[round(value, 3) for value in temperatures],
        accuracies=[[round(rate, 4) for rate in rates] for rates in accuracies],
        choices=[list(path) for path in choices],
        recipe=recipe,
    )
    heads = copy.deepcopy(model.heads).to("cpu", torch.bfloat16)

    def write(room: Path) -> None:
        write_heads(room, heads, base_model, llm.engine.vocab_size, about)
        (room / "README.md").write_text(_card(base_model, about, figures, command), encoding="utf-8")

    publish(folder, write)


def _card(base_model: str, about: About, figures: Figures, command: str) -> str:
    recipe, fingerprint = about.recipe, about.fingerprint
    assert fingerprint is not None
    rows = [
        f"| {head} | {rates[0]:.1%} | {sum(rates[:5]):.1%} |"
        for head, rates in enumerate(about.accuracies or [], start=1)
    ]
    parts = [
        f"# Medusa heads for {base_model}",
        "They share the model's output layer and are lossless: under `match`, the default rule, the text is the one "
        "that the model writes alone.",
        f"Made for a configuration with hash {fingerprint.config} and a tokenizer with hash {fingerprint.tokenizer}; "
        "others are refused.",
        "## Accuracy on texts that were held back",
        "\n".join(["| head | top-1 | top-5 |", "|---|---|---|", *rows]) + table(figures),
        "## Recipe",
        "\n".join(f"- {name}: {value}" for name, value in recipe.items()),
    ]
    if command:
        parts.append(f"```\n{command}\n```")
    return "\n\n".join(parts) + "\n"
