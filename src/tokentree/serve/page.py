"""/: a page to chat on, which shows how each word was drafted. Its files are in ``web/``, and it needs no others."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response

from tokentree.serve.errors import NOT_FOUND, ApiError

WEB = Path(__file__).parent / "web"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = frozenset(file.name for file in WEB.iterdir() if file.suffix in KINDS)
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

router = APIRouter(include_in_schema=False)


def is_page(path: str) -> bool:
    """Whether the page or one of its files lies there. These need no key, and no model."""
    return path == "/" or path.startswith("/web/")


@router.get("/")
def page() -> Response:
    """The page."""
    return _file("index.html")


@router.get("/web/{name}")
def part(name: str) -> Response:
    """One of the files that the page is made of."""
    if name not in FILES:
        raise ApiError(NOT_FOUND, "there is no such page")
    return _file(name)


def _file(name: str) -> Response:
    file = WEB / name
    return Response(file.read_bytes(), media_type=KINDS[file.suffix], headers=HEADERS)
