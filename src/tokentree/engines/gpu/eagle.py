"""An EAGLE-3 head on kernels of our own: all levels of a draft stay on the GPU (Li et al. 2025, arXiv:2503.01840).

Rows of tokens that the target has accepted are computed from its hidden states, and kept. The levels of a draft come
behind them: each has the `WIDTH` nodes of greatest joint probability, found on the device, and all levels are one
recording. The host learns of all candidates at the end, with one copy.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
from numpy.typing import NDArray

from tokentree.engines.drafting import DraftLevels
from tokentree.engines.eagle import EagleEngine, converted
from tokentree.engines.gpu.attending import CHUNK
from tokentree.engines.gpu.drafting import gather_kernel, input_kernel, select_kernel
from tokentree.engines.gpu.forward import Forward
from tokentree.engines.gpu.inputs import Inputs, Memory, Piece
from tokentree.engines.gpu.pages import Pages, Text
from tokentree.engines.gpu.products import output_kernel
from tokentree.engines.gpu.recording import Recording
from tokentree.engines.gpu.rows import BEST
from tokentree.engines.gpu.tiles import MANY
from tokentree.engines.gpu.weights import Layer, Weights, neighbours, sizes_fit
from tokentree.exclusive import exclusive
from tokentree.heads.eagle import EagleHead
from tokentree.sequence import Sequence
from tokentree.tree import Ints, TokenTree

if TYPE_CHECKING:
    from tokentree.engines.gpu.engine import TritonEngine

WIDTH = BEST  # nodes of a level that go on, and children of each that are found
LEVELS = 8  # of a draft, at most
DEEPER = (0, 2, 4, LEVELS)  # numbers of levels below the first that are recorded
TEXTS = (1, 2, 4, 8)  # numbers of texts that are recorded
EXTENDED = (1, 2, 4, 8, 16, 32, 64)  # numbers of rows that extend them
ITEMS = 512  # of attention in a level
PROMPT = 512  # rows of a prompt at a time
FOUND = 2 * WIDTH * WIDTH + WIDTH  # numbers that come of a level of one text


class DraftForward(Forward):
    """The kernels of a head: its layer, between what it reads and the most probable tokens.

    Args:
        head: on the GPU, in bfloat16.
        weights: of its layer and output, with an embedding.
        pages: of its KV.
    """

    def __init__(self, head: EagleHead, weights: Weights, pages: Pages) -> None:
        super().__init__(weights, pages, PROMPT)
        device, width = weights.embedding.device, weights.width
        self._x = torch.empty(PROMPT, 2 * width, dtype=torch.bfloat16, device=device)
        self._fc, self._fc_bias = head.fc.weight, head.fc.bias
        self._taken = torch.empty(PROMPT, head.fc.in_features, dtype=torch.bfloat16, device=device)
        self._fused = torch.empty(PROMPT, width, dtype=torch.bfloat16, device=device)
        self._embedding_gain, self._known_gain = (
            norm.weight.float() for norm in (head.input_layernorm, head.hidden_norm)
        )
        self._normed_residual = head.sizes.norm_before_residual
        self._same = torch.arange(PROMPT, dtype=torch.int32, device=device)
        self._hidden = [self.hidden, torch.empty_like(self.hidden)]

    def extend(
        self, inputs: Inputs, states: torch.Tensor, places: torch.Tensor, slots: torch.Tensor, rows: int, long: bool
    ) -> None:  # fmt: skip
        """Rows whose ``slots`` of the target's hidden ``states`` are known."""
        count, size, wide = len(places), states.shape[1], states.shape[2]
        gather_kernel[(rows, count)](
            states, places, slots, self._taken, size, wide, PLACES=count, BLOCK=triton.next_power_of_2(wide),
            num_warps=4,
        )  # fmt: skip
        way, options = self._way(rows, self._fc)
        columns, inner = self._fc.shape
        output_kernel[triton.cdiv(rows, way.rows), triton.cdiv(columns, way.columns)](
            self._taken, self._fc, self._fc if self._fc_bias is None else self._fc_bias, self._fused, rows, columns,
            inner, 0.0, BIAS=self._fc_bias is not None, CAP=False, PARTS=way.parts, **options,
        )  # fmt: skip
        self.hidden = self._hidden[0]
        self._layer(inputs, self._fused, self._same, rows, long)

    def level(self, number: int, inputs: Inputs, sources: torch.Tensor, rows: int, long: bool) -> None:
        """Rows whose parents are ``sources`` of the rows before."""
        known, self.hidden = self._hidden[number % 2], self._hidden[(number + 1) % 2]
        self._layer(inputs, known, sources, rows, long)
        self.find(rows)

    def find(self, rows: int) -> None:
        """Finds the most probable tokens of the last rows."""
        self._norm(self.weights.gain, rows)
        self._head(rows)

    def _layer(self, inputs: Inputs, known: torch.Tensor, sources: torch.Tensor, rows: int, long: bool) -> None:
        w, layer, x = self.weights, self.weights.layers[0], inputs.device
        input_kernel[(rows,)](
            x["ids"], w.embedding, known, sources, self._embedding_gain, self._known_gain, self._x, self.hidden,
            w.width, w.embedding_scale, w.eps, NORMED=self._normed_residual, BLOCK=self._block, num_warps=4,
        )  # fmt: skip
        self._heads(layer, 0, x, rows, self._x)
        self._attend(layer.rules, 0, inputs, rows, long)
        self._add(self._attended, layer.o, None, None, rows)
        self._norm(layer.mlp_gain, rows)
        self._gate(layer, rows)
        self._add(self._gated, layer.down, None, None, rows)


class TritonEagle(EagleEngine):
    """Drafts whole trees with `grow`. Draws and rules need logits level by level: these are `EagleEngine`'s, in torch.

    Args:
        head: an EAGLE-3 head that `fits`.
        target: its engine.

    Raises:
        PairingError: if the head doesn't fit the target.
    """

    def __init__(self, head: EagleHead, target: TritonEngine) -> None:
        super().__init__(head, target)
        self._engine = target
        own, device = converted(head, self._features), target.device
        sizes, pages = head.sizes, target.pages
        self._pages = Pages(
            1, sizes.num_kv_heads, sizes.head_dim, pages.keys.shape[1], len(pages.tables), pages.tables.shape[1], device
        )  # fmt: skip
        positions = self.context + LEVELS  # there are more levels recorded than asked for
        self._kernels = DraftForward(own, _weights(own, target, positions), self._pages)
        known = own.token_map
        self._map = torch.zeros(1, dtype=torch.int32, device=device) if known is None else known.int()
        self._mapped = known is not None
        self._texts: dict[int, Text] = {}  # row i is that of token i + 1
        self._extending = {rows: Inputs(rows, device) for rows in (*EXTENDED, PROMPT)}
        self._slots = Memory.make(PROMPT, device)
        self._roots, self._lengths = Memory.make(TEXTS[-1], device), Memory.make(TEXTS[-1], device)
        self._places = torch.tensor([target.places.index(tap) for tap in sizes.taps], dtype=torch.int32, device=device)
        self._levels, self._level_memory = Inputs.several(LEVELS, TEXTS[-1] * WIDTH, device, ITEMS)
        rows = TEXTS[-1] * WIDTH
        self._sources = torch.zeros(LEVELS, rows, dtype=torch.int32, device=device)
        self._scores = torch.zeros(LEVELS, rows, device=device)
        self._found = torch.zeros(LEVELS + 1, TEXTS[-1], FOUND, dtype=torch.int32, device=device)
        self._told = torch.zeros(self._found.shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._played: dict[tuple[object, ...], Recording[None]] = {}

    @staticmethod
    def fits(head: EagleHead, target: TritonEngine) -> bool:
        """Whether there are kernels for it."""
        sizes = head.sizes
        known = sizes.draft_vocab_size or sizes.vocab_size
        return (
            sizes.version == 3
            and type(head) is EagleHead
            and not sizes.more_norms
            and known >= WIDTH
            and sizes_fit(
                sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, sizes.hidden_size, sizes.intermediate_size
            )
        )

    def prefill(self, seq: Sequence, upto: int | None = None) -> int:
        return 0  # `grow` reads what is new, and so does `verify`

    @exclusive
    def grow(self, seqs: SequenceOf[Sequence], levels: int) -> list[DraftLevels] | None:
        """See `GrowsDrafts.grow`."""
        if len(seqs) > TEXTS[-1]:
            return None
        levels = min(levels, LEVELS + 1)
        texts = [self._text(seq) for seq in seqs]
        if not self._has_room(seqs, texts):
            return None
        for text, seq in zip(texts, seqs, strict=True):
            self._read_up_to(seq, text, MANY // len(seqs))
        parts = list(zip(seqs, texts, strict=True))
        count = next(size for size in TEXTS if size >= len(seqs))
        deeper = next(size for size in DEEPER if size >= levels - 1)  # few recordings serve all
        then = [(text, self._reserve(seq, text)) for seq, text in parts]
        going = enumerate(self._levels[:deeper])
        filled = [inputs.fill_level(then, level, WIDTH, self._group) for level, inputs in going]
        self._level_memory.copy()
        self._extend(parts, find=True)
        if deeper:
            long = not all(filled)
            self._play(("levels", count, deeper, long), lambda: self._grow_levels(count, deeper, long))
        self._told[:levels].copy_(self._found[:levels], non_blocking=True)
        if self._pages.keys.is_cuda:
            torch.cuda.synchronize(self._pages.keys.device)
        return [_levels_of(self._told[:levels, number].numpy()) for number in range(len(seqs))]

    def release(self, seqs: SequenceOf[Sequence]) -> None:
        super().release(seqs)
        for seq in seqs:
            if seq.id in self._texts:
                self._pages.close(self._texts.pop(seq.id))

    # -- the parts of it -------------------------------------------------------------------------------------------

    def _has_room(self, seqs: SequenceOf[Sequence], texts: SequenceOf[Text]) -> bool:
        """Whether there are pages for all rows: texts that share the target's have each their own here."""
        rows = [self._engine.committed(seq) + LEVELS * WIDTH for seq in seqs]
        return sum(-(-n // CHUNK) - len(text.pages) for n, text in zip(rows, texts, strict=True)) <= self._pages.free

    @property
    def _group(self) -> int:
        return self._kernels.sizes.group

    def _text(self, seq: Sequence) -> Text:
        if seq.id not in self._texts:
            self._texts[seq.id] = self._pages.open()
        text = self._texts[seq.id]
        text.length = min(text.length, self._engine.committed(seq) - 1)  # the root's row is always new
        return text

    def _reserve(self, seq: Sequence, text: Text) -> int:
        """Makes room for all rows of the head's, and a draft's; returns how many the text has then."""
        rows = self._engine.committed(seq)
        self._pages.reserve(text, rows + LEVELS * WIDTH)
        return rows

    def _read_up_to(self, seq: Sequence, text: Text, left: int) -> None:
        """Extends ``text`` until no more than so many rows are left."""
        while (unread := self._engine.committed(seq) - text.length) > left:
            self._extend([(seq, text)], False, min(PROMPT, unread - left))

    def _extend(self, parts: list[tuple[Sequence, Text]], find: bool, most: int = PROMPT) -> None:
        """Computes rows of accepted tokens, and with ``find`` the most probable tokens after the last ones."""
        pieces, slots, row = list[Piece](), list[Ints](), 0
        for number, (seq, text) in enumerate(parts):
            end = min(self._engine.committed(seq), text.length + most)
            ids = seq.tokens[text.length + 1 : end + 1]
            self._reserve(seq, text)
            pieces.append(Piece(text, TokenTree.chain(ids[0], ids[1:])))
            slots.append(self._engine.slots_of(seq, np.arange(text.length, end)))
            row += len(ids)
            self._roots.host[number], self._lengths.host[number] = row - 1, end
        fits = next(size for size in (*EXTENDED, PROMPT) if size >= row)
        inputs = self._extending[fits]
        long = not inputs.fill(pieces, np.zeros((0, 2), np.int64), self._group) or fits > MANY
        self._slots.host.numpy()[:row] = np.concatenate(slots)
        self._slots.host.numpy()[row:fits] = 0
        for memory, size in ((self._slots, fits), (self._roots, None), (self._lengths, None)):
            memory.copy(size)
        texts = next(size for size in TEXTS if size >= len(parts)) if find else 0
        self._play(("extend", fits, texts, long), lambda: self._extend_rows(inputs, fits, texts, long))
        if not find and self._pages.keys.is_cuda:
            torch.cuda.synchronize(self._pages.keys.device)  # before the numbers are written anew
        for piece in pieces:
            piece.text.length += piece.count

    def _extend_rows(self, inputs: Inputs, rows: int, texts: int, long: bool) -> None:
        self._kernels.extend(inputs, self._engine.pages.states, self._places, self._slots.device, rows, long)
        if texts:
            self._kernels.find(rows)
            self._select(-1, texts)

    def _grow_levels(self, texts: int, levels: int, long: bool) -> None:
        for level in range(levels):
            self._kernels.level(level, self._levels[level], self._sources[level], texts * WIDTH, long)
            self._select(level, texts, last=level == levels - 1)

    def _select(self, level: int, texts: int, last: bool = False) -> None:
        """Which candidates below ``level`` go on; -1 is the roots'."""
        first, after = level < 0, min(level + 1, LEVELS - 1)
        here, there = self._levels[max(level, 0)].device, self._levels[after].device
        select_kernel[(texts,)](
            self._kernels.best, self._roots.device, self._scores[max(level, 0)], here["tails"], self._map,
            self._lengths.device, there["ids"], self._sources[after], self._scores[after], there["tails"],
            self._found[level + 1], level + 1, FIRST=first, LAST=last, MAP=self._mapped, WIDTH=WIDTH,
            DEPTH=self._levels[0].depth, num_warps=1,
        )  # fmt: skip

    def _play(self, key: tuple[object, ...], run: Callable[[], None]) -> None:
        if not self._pages.keys.is_cuda:
            run()
            return
        if key not in self._played:
            pool = next((one.pool for one in self._played.values()), None)
            self._played[key] = Recording(run, pool)
        self._played[key].play()


def _weights(head: EagleHead, target: TritonEngine, positions: int) -> Weights:
    """What `Forward` needs of a head in the target's type."""
    sizes, of_target, device = head.sizes, target.weights, target.device
    order = neighbours(sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, sizes.head_dim).to(device)
    own, where = head.embed_tokens, torch.arange(positions, device=device)[None]
    cos, sin = head.rotary(torch.zeros(1, 1, dtype=torch.float32, device=device), where)
    half, (gate, up) = sizes.head_dim // 2, head.gate_up.weight.chunk(2)
    bias = head.qkv.bias
    layer = Layer(
        attention_gain=head.hidden_norm.weight.float(),
        qkv=head.qkv.weight[order].contiguous(),
        qkv_bias=None if bias is None else bias[order].contiguous(),
        q_gain=None,
        k_gain=None,
        o=head.o_proj.weight.contiguous(),
        o_bias=None,
        mlp_gain=head.post_attention_layernorm.weight.float(),
        gate_up=torch.stack([gate, up], 1).flatten(0, 1).contiguous(),
        down=head.down_proj.weight.contiguous(),
        attention_end_gain=None,
        mlp_end_gain=None,
        rotary=0,
        window=0,
        scale=sizes.head_dim**-0.5,
        cap=0.0,
    )
    return Weights(
        embedding=of_target.embedding if own is None else own.weight,
        embedding_scale=of_target.embedding_scale if own is None else 1.0,
        layers=[layer],
        gain=head.norm.weight.float(),
        head=of_target.head if head.lm_head is None else head.lm_head.weight.contiguous(),
        head_bias=None,
        cap=0.0,
        rotary=[(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())],
        heads=sizes.num_heads,
        kv_heads=sizes.num_kv_heads,
        head_size=sizes.head_dim,
        eps=sizes.eps,
        gelu=False,
    )


def _levels_of(told: NDArray[np.int32]) -> DraftLevels:
    """What `select_kernel` found for one text, int32[levels, FOUND]."""
    square = WIDTH * WIDTH
    shape = len(told), WIDTH, WIDTH
    tokens, found = told[:, :square].astype(np.int64), np.ascontiguousarray(told[:, square : 2 * square])
    return DraftLevels(
        tokens.reshape(shape), found.view(np.float32).reshape(shape), told[:, 2 * square :].astype(np.int64)
    )  # fmt: skip
