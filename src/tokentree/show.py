"""What the command prints: streamed text, figures, trees."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from tokentree.decoder import Watcher
from tokentree.draft import Draft
from tokentree.llm import LLM, Result, Stream
from tokentree.sequence import Accepted, Sequence

SHOWN_DEPTHS = 6
DRAFTED = "green"  # accepted draft tokens, apart from bonus tokens


def print_stream(console: Console, stream: Stream) -> None:
    """Prints text as it comes. Ctrl-C ends it cleanly: what was there stays, and so does the stream's result."""
    try:
        for piece in stream:
            style = DRAFTED if piece.drafted and console.is_terminal else ""
            console.print(Text(piece.text, style), end="", soft_wrap=True)
    except KeyboardInterrupt:
        stream.close()
    console.print()


def figures(results: dict[str, Result]) -> Table:
    """What each way of decoding cost, side by side."""
    shown = Table()
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
    """Whether the ids are the same, and what the tree gained; said only of what was compared."""
    speed = tree.metrics.tokens_per_second / plain.metrics.tokens_per_second if plain.metrics.decode_seconds else 0.0
    if tree.token_ids == plain.token_ids:
        same = f"identical: all {len(plain.token_ids)} token ids are those of plain decoding"
    else:
        pairs = zip(tree.token_ids, plain.token_ids, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tree.token_ids), len(plain.token_ids)))
        same = f"different from plain decoding from token {first} on (`tokentree check` tells a tie from an error)"
    return f"{same}; {speed:.2f}x the speed of plain"


def tree_printer(console: Console, llm: LLM) -> Watcher:
    """Prints the tree of each step, the accepted path marked."""
    tokenizer = llm.tokenizer
    names = llm.decoder.drafter.names
    step = 0

    def text_of(token: int) -> str:
        return repr(tokenizer.decode([token])) if tokenizer is not None else str(token)

    def watch(seq: Sequence, draft: Draft, accepted: Accepted) -> None:
        nonlocal step
        step += 1
        kept = set(accepted.path)
        branches = {0: Tree(Text(f"step {step}: {text_of(draft.root)}", "bold"))}
        for node in range(1, len(draft)):
            label = Text(text_of(draft.tokens[node]), f"bold {DRAFTED}" if node in kept else "dim")
            label.append(f"  {math.exp(draft.log_probs[node]):.2f}", "dim")
            if len(names) > 1:
                proposers = [name for bit, name in enumerate(names) if draft.sources[node] >> bit & 1]
                label.append(f"  {'+'.join(proposers)}", "dim")
            if node in kept:
                label.append("  accepted", DRAFTED)
            branches[node] = branches[draft.parents[node]].add(label)
        branches[accepted.path[-1]].add(Text(f"{text_of(accepted.tokens[-1])}  bonus", "bold cyan"))
        console.print(branches[0])

    return watch
