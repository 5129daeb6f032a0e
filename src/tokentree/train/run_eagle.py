"""Training an EAGLE head, from a model's name to a folder that `LLM` reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tokentree.engines.drafting import Features
from tokentree.errors import OptionError
from tokentree.heads.eagle import EagleHead, EagleSizes
from tokentree.heads.eagle_files import default_taps, read_eagle, write_eagle
from tokentree.heads.fingerprint import Fingerprint
from tokentree.heads.peagle import PEagleHead
from tokentree.heads.saved import About
from tokentree.llm import LLM
from tokentree.train.eagle import EagleTask, EagleWithLoss
from tokentree.train.features import read_parts
from tokentree.train.job import (
    check,
    claimed,
    leading,
    phases_on,
    publish,
    training_in,
    watch_with,
)
from tokentree.train.looks import listed
from tokentree.train.loop import Figures, Recipe, train
from tokentree.train.medusa import frequent_tokens
from tokentree.train.run import Trained
from tokentree.train.start import check_equal, go_on_from, rows_of, said_of
from tokentree.train.target import begin, engine_of, layer_sizes, plain_rope
from tokentree.train.texts import Texts, coverage

NORMS = ("fc_norm", "norm_before_fc", "norm_output")


def train_eagle(
    llm: LLM, base_model: str, data: str | Path, folder: str | Path, recipe: Recipe | None = None, *,
    version: int = 3, known_tokens: int = 4096, unroll: int = 5, taps: Sequence[int] | None = None,
    norms: Sequence[str] = (), start: str | Path | None = None,
    tokens: int = 1_000_000, held_back: float = 0.05, work: str | Path | None = None, console: Console | None = None,
    command: str = "", force: bool = False, stop_after: int | None = None,
) -> Trained:  # fmt: skip
    """Trains an EAGLE head on ``llm``, which stays as it is, and writes it into ``folder``.

    Its layer has the target's own sizes. It takes the target's embedding, and EAGLE-1 its output layer too. What is
    finished is kept: after an interruption, the same call goes on from there.

    Args:
        base_model: the name that the head will say it belongs to.
        data: a file of texts, see `read_texts`; or ``self``: the model writes its own, see `write_texts`.
        recipe: a step takes ``batch_size`` texts.
        version: 1 (which EAGLE-2 drafts with too) or 3.
        known_tokens: how many of the model's tokens an EAGLE-3 head knows, and EAGLE-1's loss looks at: the most
            frequent ones of the texts.
        unroll: steps of EAGLE-3's training-time test.
        taps: the hidden states that EAGLE-3 reads; by default a low, a middle and a high one.
        norms: those of EAGLE-3.1 that the head has: of `NORMS`.
        start: a folder with a head of the same making, which is trained further. It may know other tokens: of those
            that it didn't, the output layer begins as the target's.
        tokens, held_back, work, console, command, force: as for `train_medusa`.

    Raises:
        OptionError, PromptError, PairingError: if a number makes no sense, the data is no data, the model's engine has
            no such hidden states, a folder can't be written into, or it belongs to another training.
    """
    recipe, folder = recipe or Recipe(), Path(folder)
    if version not in (1, 3):
        raise OptionError("there are EAGLE versions 1 (which version 2 drafts with too) and 3")
    if wrong := sorted({*norms} - {*NORMS}):
        raise OptionError(f"there is no norm {wrong[0]!r}: choose of {', '.join(NORMS)}")
    if norms and version == 1:
        raise OptionError("EAGLE-1 has none of EAGLE-3.1's norms")
    if {"fc_norm", "norm_before_fc"} <= {*norms}:
        raise OptionError("fc_norm and norm_before_fc exclude each other: choose one")
    check(llm, held_back, known_tokens=known_tokens, tokens=tokens, unroll=unroll)
    last = engine_of(llm).capture([]).num_layers
    if unroll > llm.engine.context:
        raise OptionError(f"unroll={unroll} goes farther than a text of this model has tokens ({llm.engine.context})")
    read = (last,) if version == 1 else tuple(taps or _taps(last))
    places = read if version == 1 else (*read, last)
    features = engine_of(llm).capture(places)
    settings = {"method": f"EAGLE-{version}", "known_tokens": known_tokens, "unroll": unroll, "taps": read}
    settings |= {"norms": sorted(norms)} if norms else {}
    settings |= said_of(start)
    count = None if known_tokens >= llm.engine.vocab_size else known_tokens
    sizes = _sizes(llm, features, version, read, count, norms)
    begun = None if start is None else _begun(llm, start, sizes, last)
    settings |= {"data": str(data), "tokens": tokens if str(data) == "self" else None, "held_back": held_back}
    with phases_on(console) as phases:
        count = len(set(places))
        with claimed(llm, data, folder, settings, recipe, work, tokens, count, force, phases) as (own, shared, texts):
            first, rest = read_parts(engine_of(llm), texts, shared / "hidden", places, held_back, phases)
        known = frequent_tokens(texts.ids, known_tokens, llm.engine.vocab_size)
        model = _fresh(llm, features, sizes, known, unroll, recipe.seed)
        task, head = EagleTask(first, rest), model.head
        about = _identity(head, texts, unroll) | _go_on(begun, head)
        groups = [{"params": [weight for weight in head.parameters() if weight.requires_grad]}]
        watch = watch_with(phases, own)
        with training_in(own, phases):
            figures = train(model, groups, task, recipe, own, watch, about, stop_after, phases, begun is not None)
            told = recipe.model_dump() | {
                "version": version, "unroll": unroll if version == 3 else 1, "data": str(data), "texts": len(texts.ids),
                "tokens": texts.tokens, "coverage": round(coverage(texts, known), 4),
            }  # fmt: skip
            told |= ({"norms": ", ".join(sorted(norms))} if norms else {}) | said_of(start)
            with leading() as lead:
                if lead:
                    _write(llm, head.cpu(), folder, base_model, told, figures, command)
    return Trained(folder, figures, texts)


def _taps(last: int) -> tuple[int, ...]:
    """EAGLE-3's own choice of hidden states; of a model with too few layers for it, the first, a middle and the last
    one."""
    taps = default_taps(last)
    return taps if min(taps) >= 0 else (0, last // 2, last)


def _sizes(
    llm: LLM, features: Features, version: int, read: tuple[int, ...], known: int | None, norms: Sequence[str]
) -> EagleSizes:  # fmt: skip
    """Those of a head whose layer is as large as the target's, and which knows so many tokens."""
    config: Any = llm.config.get_text_config()
    return EagleSizes(
        version=version, **layer_sizes(config, features.hidden_size), vocab_size=llm.engine.vocab_size, taps=read,
        fc_bias=version == 1, context=llm.engine.context, draft_vocab_size=None if version == 1 else known,
        rope=plain_rope(config), **dict.fromkeys(norms, True),
    )  # fmt: skip


def _begun(llm: LLM, start: str | Path, sizes: EagleSizes, last: int) -> EagleHead:
    """The head in the folder ``start``, which has these sizes."""
    head = read_eagle(start, last, Fingerprint.of(llm.config, llm.tokenizer)).head
    if isinstance(head, PEagleHead):
        raise OptionError(f"training can't start from the head in {str(start)!r}: P-EAGLE heads aren't trained here")
    tokens = {"draft_vocab_size"}
    check_equal(start, head.sizes.model_dump(exclude=tokens), sizes.model_dump(exclude=tokens))
    return head


def _go_on(begun: EagleHead | None, head: EagleHead) -> dict[str, Any]:
    """`go_on_from`, of heads that may know other tokens."""
    if begun is None or begun.lm_head is None or head.lm_head is None:
        return go_on_from(begun, head)
    every = torch.arange(head.sizes.vocab_size)
    theirs, ours = (every if one.token_map is None else one.token_map.cpu() for one in (begun, head))
    weight = rows_of(begun.lm_head.weight.detach(), theirs, head.lm_head.weight.detach().cpu(), ours)
    return go_on_from(begun, head, {"lm_head.weight": weight} | ({} if head.token_map is None else {"token_map": ours}))


def _fresh(
    llm: LLM, features: Features, sizes: EagleSizes, known: torch.Tensor | None, unroll: int, seed: int
) -> EagleWithLoss:  # fmt: skip
    """An untrained head. An EAGLE-3 head's output layer begins as the target's."""
    head = EagleHead(sizes)
    begin(head, seed)
    ids = torch.arange(llm.engine.vocab_size, device=features.device)
    with torch.inference_mode():
        embedding = features.embedding(ids).float()
        weight, bias = features.output_weights(ids if known is None else known.to(features.device))
    if head.lm_head is not None:
        head.token_map = known
        with torch.no_grad():
            head.lm_head.weight.copy_(weight)
    output = weight.float().clone(), None if bias is None else bias.float().clone()
    return EagleWithLoss(head.to(features.device), embedding.clone(), output, unroll)


def _identity(head: EagleHead, texts: Texts, unroll: int) -> dict[str, Any]:
    """What a checkpoint belongs to beside its recipe."""
    return {"head": head.sizes.model_dump_json(), "unroll": unroll, "texts": texts.digest}


def _write(
    llm: LLM, head: EagleHead, folder: Path, base_model: str, recipe: dict[str, Any], figures: Figures, command: str
) -> None:  # fmt: skip
    """Writes the head with a model card."""
    taps = list(head.sizes.taps) if head.sizes.version == 3 else None
    about = About(fingerprint=Fingerprint.of(llm.config, llm.tokenizer), recipe=recipe, taps=taps)

    def write(room: Path) -> None:
        write_eagle(head, room, base_model, about=about)
        (room / "README.md").write_text(_card(base_model, about, figures, head, command), encoding="utf-8")

    publish(folder, write)


def _card(base_model: str, about: About, figures: Figures, head: EagleHead, command: str) -> str:
    fingerprint, recipe = about.fingerprint, about.recipe
    assert fingerprint is not None
    size = sum(weight.numel() for weight in head.parameters()) / 1e6
    reads = f"It reads hidden states {about.taps} of the target" if about.taps else "It reads the last hidden state"
    knows = f", knows {head.sizes.draft_vocab_size} tokens" if head.sizes.draft_vocab_size else ""
    parts = [
        f"# An EAGLE-{head.sizes.version} head for {base_model}",
        f"{reads}{knows}, and has {size:.1f} million parameters. It is lossless: under `match`, the default rule, the "
        "text is the one that the model writes alone.",
        f"Made for a configuration with hash {fingerprint.config} and a tokenizer with hash {fingerprint.tokenizer}; "
        "others are refused.",
        "## On texts that were held back: how often its first choice is the target's, going on from itself, and tokens "
        "of a step with first choices alone",
        listed(figures),
        "## Recipe",
        "\n".join(f"- {name}: {value}" for name, value in recipe.items()),
    ]
    if command:
        parts.append(f"```\n{command}\n```")
    return "\n\n".join(parts) + "\n"
