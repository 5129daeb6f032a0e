"""Rules that turn the target's distributions at the nodes into an accepted path and a bonus token.

`Match`, `Rejection`, `Block` and `Traversal` are lossless: the text has exactly the target's distribution (and under
`Match`, for a given seed, it is exactly the text of plain decoding). `BestPath` and `Typical` are lossy.
"""

from tokentree.acceptance.base import Acceptance, NodeLogits
from tokentree.acceptance.block import Block
from tokentree.acceptance.lossy import BestPath, Typical
from tokentree.acceptance.match import Match
from tokentree.acceptance.names import acceptance
from tokentree.acceptance.rejection import Rejection
from tokentree.acceptance.traversal import Traversal

__all__ = ["Acceptance", "BestPath", "Block", "Match", "NodeLogits", "Rejection", "Traversal", "Typical", "acceptance"]
