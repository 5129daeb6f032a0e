"""What the command prints: streamed text, figures, trees."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.table import Table

from tokentree.cli.terminal import ESCAPES, GREEN, coloured, paint, say, write
from tokentree.cli.trees import drawn, scale, step_of
from tokentree.decoder import Watcher
from tokentree.draft import Draft
from tokentree.llm import LLM, Result, Stream
from tokentree.sequence import Accepted, Sequence

SHOWN_DEPTHS = 6
WORTH_TELLING = 1.1  # tokens a forward, over plain's: a smaller difference in one run's speed is noise


def print_stream(stream: Stream) -> None:
    """Prints text as it comes. Accepted draft tokens are green where standard output is a terminal with colours; the
    text itself goes out as it is. Ctrl-C ends it cleanly: what was there stays, and so does the stream's result."""
    colours, green = coloured(sys.stdout), False
    try:
        for piece in stream:
            colours = colours and not ESCAPES.search(piece.text)
            if colours and piece.drafted:
                write(paint(piece.text, GREEN, sys.stdout))
                green = True
            elif piece.text:
                write(piece.text)
    except KeyboardInterrupt:
        stream.close()
    write("\n")
    if green:
        say(f"{paint('green', GREEN, sys.stderr)}: tokens that were drafted, and confirmed by the model")


def figures(results: dict[str, Result]) -> Table:
    """What each way of decoding cost, side by side."""
    shown = Table(
        caption="Acceptance rate: candidates accepted / (those + steps that ended above a leaf). "
        "By depth: of the steps whose tree was so deep on any branch, those whose accepted path was.",
    )
    shown.add_column("")
    for name in results:
        shown.add_column(name, justify="right")
    metrics = [result.metrics for result in results.values()]
    rows = {
        "new tokens": [f"{m.new_tokens}" for m in metrics],
        "target forwards": [f"{m.target_forwards}" for m in metrics],
        "mean accepted length": [f"{m.mean_accepted_length:.2f}" for m in metrics],
        "acceptance rate": [f"{m.acceptance_rate:.0%}" if m.drafted_tokens else "-" for m in metrics],
        "accepted at depth 1, 2, …": [_by_depth(m.accepted_by_depth, m.offered_by_depth) for m in metrics],
        "tokens/s, decoding": [f"{m.tokens_per_second:.1f}" for m in metrics],
        "prompt tokens, known before": [f"{m.prompt_tokens}, {m.reused_tokens}" for m in metrics],
        "prefill s": [f"{m.prefill_seconds:.2f}" for m in metrics],
        "draft / verify / accept s": [
            f"{m.draft_seconds:.2f} / {m.verify_seconds:.2f} / {m.accept_seconds:.2f}" for m in metrics
        ],
    }
    for label, cells in rows.items():
        shown.add_row(label, *cells)
    return shown


def _by_depth(accepted: list[int], offered: list[int]) -> str:
    shares = [f"{a / o:.0%}" for a, o in zip(accepted, offered, strict=True) if o]
    return " ".join(shares[:SHOWN_DEPTHS]) + (" …" if len(shares) > SHOWN_DEPTHS else "") or "-"


def comparison(tree: Result, plain: Result) -> str:
    """Whether the ids are the same, and what the tree gained; said only of what was compared, and a speed only where
    forwards were saved: differences beside that are noise."""
    if tree.token_ids == plain.token_ids:
        same = f"identical: all {len(plain.token_ids)} token ids are those of plain decoding"
    else:
        pairs = zip(tree.token_ids, plain.token_ids, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tree.token_ids), len(plain.token_ids)))
        same = f"different from plain decoding from token {first} on (`tokentree check` tells a tie from an error)"
    ours, theirs = tree.metrics, plain.metrics
    saved = f"{same}; {ours.target_forwards} forwards instead of {theirs.target_forwards}"
    if ours.mean_accepted_length < WORTH_TELLING * theirs.mean_accepted_length or not theirs.decode_seconds:
        return f"{saved}, too few saved for a speed that one run could tell"
    speed = ours.tokens_per_second / theirs.tokens_per_second
    return (
        f"{saved}; {speed:.2f}x the speed of plain (decoding alone, each timed once, one after the other; "
        "`tokentree bench` measures)"
    )


def tree_printer(llm: LLM) -> Watcher:
    """Prints the tree of each step to standard error, the accepted path marked."""
    drafters, names = llm.decoder.drafter.names, llm.decoder.names
    step = 0
    say(scale(drafters))

    def watch(seq: Sequence, draft: Draft, accepted: Accepted) -> None:
        nonlocal step
        step += 1
        seen = step_of(draft, accepted, names, token_text(llm))
        say(drawn(seen, f"step {step}", with_drafters=len(drafters) > 1 or seq.guide is not None))

    return watch


def token_text(llm: LLM) -> Callable[[int], str]:
    """What tokens are called in trees: their texts, as Python writes them; without a tokenizer their ids."""
    tokenizer = llm.tokenizer
    return str if tokenizer is None else lambda token: repr(tokenizer.decode([token]))
