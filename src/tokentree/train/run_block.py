"""Training a block head, from a model's name to a folder that `LLM` reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from tokentree.engines.drafting import Features
from tokentree.errors import OptionError
from tokentree.heads.block import BlockHead, BlockSizes
from tokentree.heads.block_files import default_places, read_block, write_block
from tokentree.heads.convolution import Convolution
from tokentree.heads.fingerprint import Fingerprint
from tokentree.heads.saved import About
from tokentree.llm import LLM
from tokentree.train.block import BlockTask, BlockWithLoss
from tokentree.train.features import read_parts
from tokentree.train.job import check, claimed, leading, phases_on, publish, training_in, watch_with
from tokentree.train.looks import listed
from tokentree.train.loop import Figures, Recipe, train
from tokentree.train.medusa import frequent_tokens
from tokentree.train.run import Trained
from tokentree.train.start import check_equal, go_on_from, said_of
from tokentree.train.target import begin, engine_of, layer_sizes, plain_rope
from tokentree.train.texts import coverage

# how the rows of a head of each kind guess, and what its tokens say of their successors
KINDS: dict[str, dict[str, Any]] = {
    "dspark": {"anchor_first": True},
    "dspark-gated": {"anchor_first": True, "markov": "gated"},
    "dspark-rnn": {"anchor_first": True, "markov": "rnn"},
    "dflash2": {"markov": "selector", "conv_taps": 2},
}
CANDIDATES, GROUP = 16, 16  # DFlash 2's own: tokens that a selector takes from, channels that convolutions treat alike


def train_block(
    llm: LLM, base_model: str, data: str | Path, folder: str | Path, recipe: Recipe | None = None, *,
    kind: str = "dspark", num_layers: int = 2, block_size: int = 7, markov_rank: int = 64, anchors: int = 64,
    distil: float = 0.9, pace: float | None = None, start: str | Path | None = None,
    taps: Sequence[int] | None = None, known_tokens: int = 16384, tokens: int = 1_000_000, held_back: float = 0.05,
    work: str | Path | None = None, console: Console | None = None, command: str = "", force: bool = False,
    stop_after: int | None = None,
) -> Trained:  # fmt: skip
    """Trains a block head on ``llm``, which stays as it is, and writes it into ``folder``, in DeepSpec's layout; one of
    DFlash 2's kind in z-lab's.

    Its layers have the target's own sizes. It takes the target's embedding and output layer, and has an embedding of
    its own for the mask. The anchor's row guesses the next token, but in DFlash 2. What is finished is kept: after an
    interruption, the same call goes on from there.

    Args:
        base_model: the name that the head will say it belongs to.
        data: a file of texts, see `read_texts`; or ``self``: the model writes its own, see `write_texts`.
        recipe: a step takes ``batch_size`` texts.
        kind: one of `KINDS`.
        num_layers, markov_rank: of the head, see `BlockSizes`.
        block_size: how many tokens it guesses in one pass.
        anchors, distil, pace: see `BlockWithLoss`.
        start: a folder with a head of the same making, which is trained further; which tokens it knows stays.
        taps: the hidden states that it reads; by default three, as z-lab's heads choose them.
        known_tokens: how many of the model's tokens it knows: the most frequent ones of the texts.
        tokens, held_back, work, console, command, force: as for `train_medusa`.

    Raises:
        OptionError, PromptError, PairingError: if a number makes no sense, the data is no data, the model's engine has
            no such hidden states, a folder can't be written into, or it belongs to another training.
    """
    recipe, folder = recipe or Recipe(learning_rate=6e-4), Path(folder)
    sizes = {"num_layers": num_layers, "block_size": block_size, "anchors": anchors}
    check(llm, held_back, known_tokens=known_tokens, tokens=tokens, **sizes)
    if kind not in KINDS:
        raise OptionError(f"unknown kind {kind!r}: choose one of {', '.join(KINDS)}")
    if markov_rank == 0 and kind != "dspark":
        raise OptionError(f"markov_rank must be at least 1 for a head of the kind {kind!r}")
    if markov_rank < 0 or not 0 <= distil <= 1 or not 0 <= (pace or 0) <= 1:
        raise OptionError("markov_rank must be at least 0, and distil and pace shares")
    last = engine_of(llm).capture([]).num_layers
    read = tuple(taps or _taps(last))
    places = (*read, last)
    features = engine_of(llm).capture(places)
    settings = {"method": "block", "known_tokens": known_tokens, "markov_rank": markov_rank, "taps": read, **sizes}
    settings |= {"data": str(data), "tokens": tokens if str(data) == "self" else None, "held_back": held_back}
    settings["distil"] = distil
    settings |= {"kind": kind} if kind != "dspark" else {}
    settings |= {"pace": pace} if pace is not None else {}
    settings |= said_of(start)
    count = None if known_tokens >= llm.engine.vocab_size else known_tokens
    form = _sizes(llm, features, read, count, num_layers, block_size, markov_rank, kind)
    begun = None if start is None else _begun(llm, start, form, last)
    with phases_on(console) as phases:
        count = len(set(places))
        with claimed(llm, data, folder, settings, recipe, work, tokens, count, force, phases) as (own, shared, texts):
            first, rest = read_parts(engine_of(llm), texts, shared / "hidden", places, held_back, phases)
        known = frequent_tokens(texts.ids, known_tokens, llm.engine.vocab_size)
        if begun is not None:
            known = begun.token_map
        head = _fresh(llm, features, form, known, recipe.seed)
        model = _with_loss(head, features, anchors, distil, pace)
        about = {"head": head.sizes.model_dump_json(), "anchors": anchors, "distil": distil, "texts": texts.digest}
        about |= ({"pace": pace} if pace is not None else {}) | go_on_from(begun, head)
        groups = [{"params": list(head.parameters())}]
        watch, task = watch_with(phases, own), BlockTask(first, rest)
        with training_in(own, phases):
            figures = train(model, groups, task, recipe, own, watch, about, stop_after, phases, begun is not None)
            told = recipe.model_dump() | {
                "anchors": anchors, "distil": distil, "data": str(data), "texts": len(texts.ids),
                "tokens": texts.tokens, "coverage": round(coverage(texts, known), 4),
            }  # fmt: skip
            told |= {"kind": kind} if kind != "dspark" else {}
            told |= {"pace": pace} if pace is not None else {}
            told |= said_of(start)
            with leading() as lead:
                if lead:
                    _write(llm, head.cpu(), folder, base_model, told, figures, command)
    return Trained(folder, figures, texts)


def _taps(last: int) -> tuple[int, ...]:
    """Three hidden states before the last norm, fewer of a model with few layers."""
    return default_places(last, 3) if last > 5 else tuple(sorted({0, last // 2, last - 1}))


def _sizes(
    llm: LLM, features: Features, read: tuple[int, ...], known: int | None, num_layers: int, block_size: int,
    markov_rank: int, kind: str,
) -> BlockSizes:  # fmt: skip
    """Those of a head of a `KINDS`, whose layers are as large as the target's, and which knows so many tokens."""
    config: Any = llm.config.get_text_config()
    vocab, own = llm.engine.vocab_size, dict(KINDS[kind])
    if own.get("markov") == "selector":
        own |= {"candidates": min(CANDIDATES, known or vocab), "conv_group": math.gcd(GROUP, features.hidden_size)}
    return BlockSizes(
        **layer_sizes(config, features.hidden_size), **own, num_layers=num_layers, vocab_size=vocab, taps=read,
        block_size=block_size + (not own.get("anchor_first")), markov_rank=markov_rank, rope=plain_rope(config),
        context=llm.engine.context, draft_vocab_size=known,
    )  # fmt: skip


def _begun(llm: LLM, start: str | Path, sizes: BlockSizes, last: int) -> BlockHead:
    """The head in the folder ``start``, which has these sizes."""
    head = read_block(start, last, Fingerprint.of(llm.config, llm.tokenizer)).head
    check_equal(start, head.sizes.model_dump(), sizes.model_dump())
    return head


def _fresh(
    llm: LLM, features: Features, sizes: BlockSizes, known: torch.Tensor | None, seed: int
) -> BlockHead:  # fmt: skip
    """An untrained head. The mask begins as the mean of all tokens. The Markov part says nothing at first, and
    convolutions change nothing."""
    head = BlockHead(sizes)
    begin(head, seed)
    head.token_map = known
    ids = torch.arange(llm.engine.vocab_size, device=features.device)
    with torch.no_grad():
        assert head.mask_embedding is not None
        head.mask_embedding.copy_(features.embedding(ids).float().mean(0))
        if head.markov is not None:
            generator = torch.Generator().manual_seed(seed)
            nn.init.normal_(head.markov.first.weight, std=sizes.markov_rank**-0.5, generator=generator)
            nn.init.zeros_(head.markov.second.weight)
        for part in head.modules():
            if isinstance(part, Convolution):
                nn.init.zeros_(part.told.weight)
    return head.to(features.device)


def _with_loss(
    head: BlockHead, features: Features, anchors: int, distil: float, pace: float | None
) -> BlockWithLoss:  # fmt: skip
    ids = torch.arange(head.sizes.vocab_size, device=features.device)
    with torch.inference_mode():
        embedding = features.embedding(ids).float()
        weight, bias = features.output_weights(ids if head.token_map is None else head.token_map)
    output = weight.float().clone(), None if bias is None else bias.float().clone()
    return BlockWithLoss(head, embedding.clone(), output, anchors, distil=distil, pace=pace)


def _write(
    llm: LLM, head: BlockHead, folder: Path, base_model: str, recipe: dict[str, Any], figures: Figures, command: str
) -> None:  # fmt: skip
    """Writes the head with a model card."""
    about = About(
        fingerprint=Fingerprint.of(llm.config, llm.tokenizer), recipe=recipe, taps=list(head.sizes.taps)
    )  # fmt: skip

    def write(room: Path) -> None:
        layers = engine_of(llm).capture([]).num_layers
        layout = "zlab" if head.sizes.markov == "selector" else "deepspec"
        write_block(head, room, base_model, layout, about=about, num_layers=layers)
        (room / "README.md").write_text(_card(base_model, about, figures, head, command), encoding="utf-8")

    publish(folder, write)


def _card(base_model: str, about: About, figures: Figures, head: BlockHead, command: str) -> str:
    assert about.fingerprint is not None
    size, sizes = sum(weight.numel() for weight in head.parameters()) / 1e6, head.sizes
    parts = [
        f"# A block head for {base_model}",
        f"It reads hidden states {about.taps} of the target, knows {sizes.draft_vocab_size or sizes.vocab_size} "
        f"tokens, guesses {sizes.num_guesses} in one pass, and has {size:.1f} million parameters. It is lossless: "
        "under `match`, the default rule, the text is the one that the model writes alone.",
        f"Made for a configuration with hash {about.fingerprint.config} and a tokenizer with hash "
        f"{about.fingerprint.tokenizer}; others are refused.",
        "## On texts that were held back: how often its first choice is the text's token where those before it were, "
        "and tokens of a step with first choices alone",
        listed(figures),
        "## Recipe",
        "\n".join(f"- {name}: {value}" for name, value in about.recipe.items()),
    ]
    if command:
        parts.append(f"```\n{command}\n```")
    return "\n\n".join(parts) + "\n"
