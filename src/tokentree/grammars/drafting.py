"""Drafts under a grammar: without what it forbids, and with what it leaves no choice of."""

from __future__ import annotations

from tokentree.draft import Draft
from tokentree.errors import RequestError
from tokentree.grammars.guide import Guide
from tokentree.growing import DEPTH, LOG_PROB, PARENT, SOURCES, TOKEN

NAME = "grammar"  # of the proposer of forced tokens, in figures


def guided(draft: Draft, guide: Guide, source: int, depth: int) -> Draft:
    """``draft`` without the nodes that ``guide`` doesn't allow, and what hangs below them; below its leaves, the tokens
    that must come there. Ranks are counted anew. What must come has probability 1, whoever proposed it.

    Nothing is lost by it: a node that isn't allowed is never accepted. Where the matcher fails, nothing is proposed.

    Args:
        draft: its children were picked, not drawn.
        source: the bit of the proposer of forced tokens.
        depth: no forced token is deeper.
    """
    part = Draft(draft.root, None, draft.level_seconds, draft.levels, draft.paid)
    places = {0: 0}  # of the draft's nodes, in ``part``
    paths, counts = [list[int]()], [0]  # of the nodes of ``part``: the path, and the number of children
    for node in range(1, len(draft)):
        parent, token = places.get(int(draft.ints[PARENT, node])), int(draft.ints[TOKEN, node])
        if parent is None or not _allows(guide, paths[parent], token):
            continue
        log_prob, sources = float(draft.floats[LOG_PROB, node]), int(draft.ints[SOURCES, node])
        if not counts[parent] and guide.has_one(paths[parent]):
            log_prob, sources = 0.0, sources | source
        places[node] = part.add(parent, token, log_prob, counts[parent], sources)
        counts[parent] += 1
        paths.append([*paths[parent], token])
        counts.append(0)
    for leaf in [node for node, children in enumerate(counts) if not children]:
        node = leaf
        for token in _forced(guide, paths[leaf], depth - int(part.ints[DEPTH, leaf])):
            node = part.add(node, token, 0.0, 0, source)
    return part


def _allows(guide: Guide, path: list[int], token: int) -> bool:
    try:
        return guide.allows(path, token)
    except RequestError:
        return False


def _forced(guide: Guide, path: list[int], count: int) -> list[int]:
    try:
        return guide.forced(path, count)
    except RequestError:
        return []
