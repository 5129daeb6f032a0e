"""The best static tree for known acceptance rates: by rank alone (Sequoia, Chen et al. 2024, arXiv:2402.12374, section
3), or by depth and rank where levels know nothing of one another (Medusa, Cai et al. 2024, arXiv:2401.10774, section
2.3.3)."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from functools import cache
from heapq import heapify, heappop, heappush

from tokentree.errors import OptionError

# A good draft model's, by rank: a place to start from where nothing was measured.
TYPICAL_RATES = (0.7, 0.12, 0.05, 0.03, 0.02, 0.01)


def optimal_paths(rates: SequenceOf[float], nodes: int, depth: int) -> tuple[float, list[tuple[int, ...]]]:
    """The tree with the most expected tokens, by dynamic programming over (nodes, depth, first rank).

    The child of rank r is accepted with probability ``rates[r]`` once its parent is, whatever its depth. The best
    subtree of n nodes under an accepted node gives F(n, d) = 1 + G(n - 1, d, 0) tokens, where G spends m nodes on the
    children of rank r and later: G(m, d, r) = max over k of rates[r] F(k, d - 1) + G(m - k, d, r + 1), F(0, d) = 0.

    Args:
        rates: acceptance by rank.
        nodes: nodes of the tree, root included.
        depth: most candidates on a path.

    Returns:
        Expected tokens per forward, the bonus included, and the rank paths of the tree, prefixes first.

    Raises:
        OptionError: if there is no node to place, or a rate is no probability.
    """
    if nodes < 2 or depth < 1:
        raise OptionError("an optimal shape needs nodes of at least 2 and depth of at least 1")
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise OptionError("acceptance rates by rank are probabilities, at least one")

    @cache
    def below(left: int, depth: int, rank: int) -> tuple[float, int]:
        """G, and how many nodes the child of this rank gets."""
        if left == 0 or depth == 0 or rank == len(rates):
            return 0.0, 0
        best = 0.0, 0
        for size in range(1, left + 1):
            here = rates[rank] * (1 + below(size - 1, depth - 1, 0)[0])
            value = here + below(left - size, depth, rank + 1)[0]
            if value > best[0]:
                best = value, size
        without = below(left, depth, rank + 1)[0]  # more only where a later rank has a higher rate
        return best if best[0] >= without else (without, 0)

    def collect(left: int, depth: int, rank: int, path: tuple[int, ...]) -> None:
        if left == 0 or depth == 0 or rank == len(rates):
            return
        _, size = below(left, depth, rank)
        if size:
            paths.append((*path, rank))
            collect(size - 1, depth - 1, 0, paths[-1])
        collect(left - size, depth, rank + 1, path)

    paths = list[tuple[int, ...]]()
    collect(nodes - 1, depth, 0, ())
    return 1 + below(nodes - 1, depth, 0)[0], sorted(paths, key=lambda path: (len(path), path))


def find_choices(accuracies: SequenceOf[SequenceOf[float]], nodes: int) -> list[tuple[int, ...]]:
    """The rank paths of the static tree with the most expected tokens, where candidate r of head k is right with
    probability ``accuracies[k][r]``, whatever stands before it: the most probable paths.

    Args:
        nodes: of the tree, root included.

    Returns:
        At most ``nodes - 1`` paths, prefixes first.

    Raises:
        OptionError: if there is no node to place, or an accuracy is no probability.
    """
    if nodes < 2:
        raise OptionError("choices need nodes of at least 2")
    if not accuracies or not all(rates and all(0 <= rate <= 1 for rate in rates) for rates in accuracies):
        raise OptionError("accuracies by head and rank are probabilities, at least one for each head")
    waiting: list[tuple[float, tuple[int, ...]]] = [(-rate, (rank,)) for rank, rate in enumerate(accuracies[0])]
    heapify(waiting)
    paths = list[tuple[int, ...]]()
    while waiting and len(paths) < nodes - 1:
        minus, path = heappop(waiting)
        if minus == 0:
            break  # never right
        paths.append(path)
        if len(path) < len(accuracies):
            for rank, rate in enumerate(accuracies[len(path)]):
                heappush(waiting, (minus * rate, (*path, rank)))
    return sorted(paths, key=lambda path: (len(path), path))
