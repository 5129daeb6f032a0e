"""/speculation: the ways to draft that a request may choose."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from tokentree.serve.replies import Reply, told
from tokentree.serve.service import service_of
from tokentree.shapes.parse import EXAMPLES

router = APIRouter()


class Ways(Reply):
    """What the field ``speculation`` of a request may say."""

    proposers: list[str]
    drafters: list[str]
    shapes: list[str]
    max_tree_nodes: int


@router.get("/speculation", summary="The ways to draft", responses=told(Ways), response_model=None)
async def ways(request: Request) -> dict[str, Any]:
    """Who proposes where a request chooses nothing; the drafters that may be chosen, alone or joined by '+'; examples
    of shapes; and the size of the largest tree."""
    service = service_of(request)
    return {
        "proposers": service.llm.decoder.drafter.names,
        "drafters": service.llm.drafters,
        "shapes": list(EXAMPLES),
        "max_tree_nodes": service.settings.tree_nodes,
    }
