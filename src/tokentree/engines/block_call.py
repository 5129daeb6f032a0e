"""Block heads in one compiled call, and which heads those are."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokentree.engines.block import Blocks, TorchBlocks, converted, divisor_of
from tokentree.engines.cpu.block_program import BlockProgram
from tokentree.engines.cpu.quantized import QuantizedLinear
from tokentree.engines.drafting import HasHiddenStates, Slots
from tokentree.engines.kv import SequenceKV
from tokentree.heads.block import BlockHead
from tokentree.sequence import Sequence

LAST = 16  # tokens at the end of a text that are read in the same call


def blocks_of(head: BlockHead, target: HasHiddenStates) -> Blocks:
    """What runs ``head`` fastest on the hidden states of ``target``.

    Raises:
        PairingError: if the head doesn't fit the target.
    """
    one_call = BlockProgram.fits(head.sizes, target.capture(head.sizes.taps))
    return CompiledBlocks(head, target) if one_call else TorchBlocks(head, target)


class CompiledBlocks(Blocks):
    """Runs a `BlockProgram`. Its head's sizes are such as that `fits`."""

    def __init__(self, head: BlockHead, target: HasHiddenStates) -> None:
        super().__init__(head, target, blocked=True)
        made = converted(head, self._features)
        output: Any = self._output if made.lm_head is None else QuantizedLinear(made.lm_head.weight.detach(), None)
        embedding = self._features.embedding if made.embed_tokens is None else made.embed_tokens
        self.markov = made.markov
        self._program = BlockProgram(made, embedding, output, self._map)

    @torch.inference_mode()
    def guess(self, seqs: SequenceOf[Sequence]) -> tuple[torch.Tensor, torch.Tensor]:
        self._run(seqs, None)
        return self._program.said(len(seqs))

    @torch.inference_mode()
    def slots(self, seqs: SequenceOf[Sequence]) -> list[Slots]:
        self._run(seqs, np.array([divisor_of(seq) for seq in seqs], np.float32))
        return self._program.slots(len(seqs))

    def _store(self, kv: SequenceKV, states: torch.Tensor) -> None:
        self._program.read(kv, states)

    def _run(self, seqs: SequenceOf[Sequence], divisors: NDArray[np.float32] | None) -> None:
        kvs, states = list[SequenceKV](), list[torch.Tensor]()
        for seq in seqs:
            end = self._target.committed(seq)
            self.prefill(seq, end - LAST)
            kvs.append(self._kv(seq))
            states.append(self._states(seq, kvs[-1].length, end))
        self._program.guess(kvs, states, np.array([seq.tokens[-1] for seq in seqs]), divisors)
