"""The application."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from tokentree.llm import LLM
from tokentree.serve import chat, completions, facts, page, ways
from tokentree.serve.pages import docs_page
from tokentree.serve.protection import protect
from tokentree.serve.responses import route
from tokentree.serve.service import Service
from tokentree.serve.settings import Settings
from tokentree.serve.structured import prepare


def create_app(settings: Settings, llm: LLM | None = None) -> FastAPI:
    """An ASGI application with OpenAI's interface. Its `Service` is ``app.state.service``.

    Args:
        llm: the model. Without one, whoever makes the app calls `Service.start` later, and requests get the status 503
            until then.

    Raises:
        ModelError: if ``llm`` has no tokenizer.
    """
    service = Service(settings)
    if llm is not None:
        prepare(llm)
        service.start(llm)
    app = FastAPI(title="tokentree", version=version("tokentree"), docs_url=None, redoc_url=None)
    app.state.service = service
    for part in (chat, completions, route, facts, ways, page):
        app.include_router(part.router)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()))

    protect(app, settings, lambda: service.backends)
    return app
