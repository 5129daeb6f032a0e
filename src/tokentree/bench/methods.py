"""What can be measured: this library's own methods, and others' (`peers`) beside them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from tokentree.bench.peers import Method, Output, Peers
from tokentree.errors import OptionError
from tokentree.heads.saved import kind_of
from tokentree.llm import LLM
from tokentree.sampling import SamplingParams

FORMS = (
    "plain, default, DRAFTER:SHAPE such as merged:cost, draft_model:chain:3, ngram+draft_model:2x2x1 or "
    "draft_model:vocabulary=tli:cost, transformers, transformers:assisted:N, transformers:lookup:N, llama.cpp:FILE, "
    "llama.cpp:FILE:lookup:N, openvino:MODEL or openvino:MODEL:lookup:N"
)


class TreeMethod:
    """A drafter and a shape of this library. Each has its own drafter: what one learns, no other sees."""

    def __init__(self, name: str, llm: LLM) -> None:
        self.name, self.learns = name, name != "plain"
        self._llm = llm

    def run(self, prompt_ids: list[int], params: SamplingParams) -> Output:
        result = self._llm.generate([prompt_ids], params)[0]
        metrics = result.metrics
        return Output(
            result.token_ids, metrics.prefill_seconds, metrics.decode_seconds, metrics.new_tokens, metrics.to_dict()
        )

    def run_together(self, prompts: list[list[int]], params: SamplingParams) -> Output:
        """All prompts as one batch: the ids behind one another, the wall time of all steps, counts added up."""
        started, seqs = time.perf_counter(), [self._llm.sequence(ids, params) for ids in prompts]
        for _ in self._llm.run(seqs, len(seqs)):
            pass
        wall = time.perf_counter() - started
        if failed := next((seq.error for seq in seqs if seq.error is not None), None):
            raise failed
        counted = [seq.metrics.to_dict() for seq in seqs]
        prefill = sum(m["prefill_seconds"] for m in counted)
        names = ("new_tokens", "target_forwards", "drafted_tokens", "accepted_tokens", "refused_steps")
        metrics = {name: sum(m[name] for m in counted) for name in names}
        ids = [token for seq in seqs for token in seq.output_ids]
        return Output(ids, prefill, wall - prefill, metrics["new_tokens"], metrics)


def make_method(spec: str, llm: LLM, peers: Peers, heads: Sequence[Path] = ()) -> Method:
    """The method that ``spec`` names. Of ``heads``, it drafts with the first ones of the kind that it names, or else
    with those that ``llm`` has.

    Raises:
        OptionError: if it names none.
    """
    if spec == "plain":
        return TreeMethod(spec, llm.plain())
    if spec == "default":
        return TreeMethod(spec, llm.using())
    kind, _, rest = spec.partition(":")
    if kind in peers.kinds:
        return peers.method(spec, kind, rest)
    while "=" in (option := rest.partition(":"))[0]:  # of the last drafter; a shape's come behind its name
        kind, rest = f"{kind}:{option[0]}", option[2]
    if not rest:
        raise OptionError(f"{spec!r} is not a method: write {FORMS}")
    names = kind.split("+")
    own = next((folder for folder in heads if kind_of(folder) in names), None)
    return TreeMethod(spec, llm.using(names if len(names) > 1 else kind, rest, heads=own))
