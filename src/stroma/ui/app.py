"""The ASGI application: routes and error pages."""

from __future__ import annotations

import socket
from functools import partial
from pathlib import Path
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from stroma._utils.text import clean
from stroma.checkpoint.errors import CheckpointNotFound, RequestRefused, StoreError
from stroma.checkpoint.history.reader import History
from stroma.ui.actions import CONTROLS, Actions, SubmitForm
from stroma.ui.answers import Answers
from stroma.ui.events import Events
from stroma.ui.pages import Pages
from stroma.ui.rendering import Renderer
from stroma.ui.run_pages import RunPages
from stroma.ui.security import ASGIApp, Keys, SecurityMiddleware
from stroma.ui.settings import Settings

_HERE: Final = Path(__file__).parent
_LARGE_PAGE: Final = 50_000  # bytes
#: Statuses of requests that a store refuses.
_STATUSES: Final = {RequestRefused: 409, CheckpointNotFound: 404}
_MAX_REQUESTS: Final = 400  # at once; further ones get 503


def make_app(settings: Settings) -> ASGIApp:
    """Return the ASGI application behind its :class:`SecurityMiddleware`."""
    keys = Keys(settings.token)
    history = History(settings.store, settings.redact)
    renderer = Renderer(settings, history, keys)
    pages, run_pages = Pages(renderer), RunPages(renderer)
    actions = Actions(settings, keys)
    answers = Answers(renderer, actions)
    submit_form = SubmitForm(renderer)
    events = Events(settings, renderer.shared)

    routes: list[Any] = [
        Route("/", pages.runs),
        Route("/run", run_pages.run),
        Route("/attempt", run_pages.attempt),
        Route("/payload", run_pages.payload),
        Route("/overview", pages.overview),
        Route("/pipeline", pages.pipeline),
        Route("/steps.svg", pages.steps),
        Route("/export", run_pages.export),
        Route("/trace", run_pages.trace),
        Route("/submit", submit_form.page),
        Route("/submit", submit_form.submit, methods=["POST"]),
        Route("/resume", actions.resume, methods=["POST"]),
        Route("/fork", actions.fork, methods=["POST"]),
        Route("/approve", answers.approve, methods=["POST"]),
        Route("/delete", actions.delete, methods=["POST"]),
        Route("/send", actions.send, methods=["POST"]),
        *(Route(f"/{one}", partial(actions.control, one), methods=["POST"]) for one in CONTROLS),
        Route("/events", events.stream),
        Mount("/static", StaticFiles(directory=_HERE / "static", packages=[("stroma.trace", "static")])),
    ]

    async def on_store_error(request: Request, error: Exception) -> Response:
        text = clean(str(error), 1000)
        status = next((status for kind, status in _STATUSES.items() if isinstance(error, kind)), None)
        if status is None:
            return renderer.problem(503, "The store could not be read", text)
        return renderer.problem(status, text, "", getattr(request.state, "run_id", ""))

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        run_id = getattr(request.state, "run_id", "")
        return renderer.problem(error.status_code, error.detail, "", run_id)

    async def on_anything(request: Request, error: Exception) -> Response:
        # The exception may contain data of a run: it is logged, not shown.
        return renderer.problem(500, "Internal error", "The log of `stroma ui` has the details.")

    app = Starlette(
        routes=routes,
        middleware=[Middleware(GZipMiddleware, minimum_size=_LARGE_PAGE, compresslevel=6)],
        exception_handlers={StoreError: on_store_error, HTTPException: on_http_error, Exception: on_anything},
    )
    hosts = frozenset(host.lower() for host in settings.hosts)
    return SecurityMiddleware(app, keys, hosts, settings.private_host)


def make_server(app: Any) -> uvicorn.Server:
    """Return the server of an application. Requests have it in their state: streams end with it."""

    async def with_server(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "state": {"server": server}}, receive, send)

    server = uvicorn.Server(
        uvicorn.Config(
            with_server,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=3,
            limit_concurrency=_MAX_REQUESTS,
        )
    )
    return server


def serve(app: Any, listening: socket.socket) -> None:
    """Serve an application on a listening socket until SIGINT or SIGTERM."""
    make_server(app).run(sockets=[listening])
