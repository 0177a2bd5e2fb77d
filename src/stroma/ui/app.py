"""The application: settings, addresses, and how an error becomes a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from stroma._words import clean
from stroma.checkpoint._states import AsyncStates
from stroma.checkpoint.errors import StoreError
from stroma.history import History, Redact
from stroma.page import STYLE
from stroma.ui.actions import Actions
from stroma.ui.events import Events
from stroma.ui.pages import Pages
from stroma.ui.security import ASGIApp, Guard, Keys

__all__ = ["Settings", "make_app"]

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Settings:
    """What one web interface shows, and to whom.

    Attributes:
        store: whose runs are shown.
        name: what the pages call the store; without a password.
        hosts: what the Host header may be: "127.0.0.1:8427".
        token: what everybody must show who connects; None where only this machine can.
        private_host: one of ``hosts`` whose name nobody else has; only under it the token becomes a cookie.
        redact: see RunConfig; applied to every state.
        pipeline: the name of the pipeline whose runs can be resumed from here; None if none can.
        resume: begins a process that resumes a run, by its id.
        command: the words of a command of ours that finds the same store: ``command("resume", "RUN")``.
        lineage: the picture of ``pipeline``, as SVG.
        poll_seconds: how often the store is looked at for pages that are open.
    """

    store: AsyncStates
    name: str
    hosts: Sequence[str]
    token: str | None = None
    private_host: str | None = None
    redact: Redact | None = None
    pipeline: str | None = None
    resume: Callable[[str], None] | None = None
    command: Callable[..., str] = field(default=lambda *words: " ".join(["stroma", *words]))
    lineage: str | None = None
    poll_seconds: float = 1.0


def make_app(settings: Settings) -> ASGIApp:
    """The ASGI application; every answer of it goes through the guard."""
    keys = Keys(settings.token)
    history = History(settings.store, settings.redact)
    pages = Pages(settings, history, keys)
    actions = Actions(settings, keys)
    events = Events(settings)

    def style(request: Request) -> Response:
        return Response(STYLE, media_type="text/css")

    routes: list[Any] = [
        Route("/", pages.runs),
        Route("/run", pages.run),
        Route("/attempt", pages.attempt),
        Route("/payload", pages.payload),
        Route("/compare", pages.compare),
        Route("/overview", pages.overview),
        Route("/pipeline", pages.pipeline),
        Route("/lineage.svg", pages.lineage),
        Route("/export", pages.export),
        Route("/resume", actions.resume, methods=["POST"]),
        Route("/delete", actions.delete, methods=["POST"]),
        Route("/events", events.stream),
        Route("/static/page.css", style),
        Mount("/static", StaticFiles(directory=_HERE / "static")),
    ]

    async def on_store_error(request: Request, error: Exception) -> Response:
        return pages.problem(503, "The store could not be read", clean(str(error), 1000))

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return pages.problem(error.status_code, error.detail, "")

    async def on_anything(request: Request, error: Exception) -> Response:
        # What went wrong may hold what a run holds. The server logs it; the page does not tell.
        return pages.problem(500, "This should not have happened", "The log of `stroma ui` says more.")

    app = Starlette(
        routes=routes,
        exception_handlers={StoreError: on_store_error, HTTPException: on_http_error, Exception: on_anything},
    )
    hosts = frozenset(host.lower() for host in settings.hosts)
    return Guard(app, keys, hosts, settings.private_host)
