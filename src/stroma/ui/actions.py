"""Actions of pages: resume, pause, cancel or delete a run, change its budget, state how a call of an effect ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode

from anyio import to_thread
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from stroma._utils.text import clean
from stroma.checkpoint.decisions import UNFINISHED
from stroma.checkpoint.entries import Waiting
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.history import FINISHED
from stroma.checkpoint.records import RunRecord
from stroma.contracts.effects import NotDone
from stroma.runner.requests import limits_of
from stroma.runner.requests import request as make_request
from stroma.runner.signals import match_answer

if TYPE_CHECKING:
    from stroma.ui.security import Keys
    from stroma.ui.settings import Settings

__all__ = ["Actions", "can_resume", "controls_of"]

_MAX_FORM_BYTES = 100_000


def can_resume(settings: Settings, record: RunRecord) -> bool:
    """Return True if a page may resume a run: an unfinished one of this pipeline without an owner."""
    return (
        settings.resume is not None
        and record.pipeline == settings.pipeline
        and record.status not in FINISHED
        and record.holder is None
        and record.run_id != "last"  # The command would resume the latest run.
    )


def controls_of(record: RunRecord) -> list[str]:
    """Return the requests about a run that a page offers: names of actions."""
    if record.status not in ("RUNNING", *UNFINISHED):
        return ["budget", "cancel"] if record.status == "PARTIAL" else []
    return ["unpause" if record.waits_for == "resume" else "pause", "budget", "cancel"]


class Actions:
    """Handlers of forms, which only accept forms with a key of this process."""

    def __init__(self, settings: Settings, keys: Keys) -> None:
        self._settings = settings
        self._keys = keys

    async def resume(self, request: Request) -> Response:
        record, _ = await self._read_form("resume", request)
        resume = self._settings.resume
        if resume is None or not can_resume(self._settings, record):
            raise HTTPException(409, "this run cannot be resumed here; its page shows the command")
        await to_thread.run_sync(resume, record.run_id)
        return RedirectResponse(f"/run?{urlencode({'id': record.run_id})}", 303)

    async def state_effect(self, request: Request) -> Response:
        """Store what a person states about the call of an effect: its output, or that it did not happen."""
        record, form = await self._read_form("effect", request)
        store: Any = self._settings.store
        pending: list[Waiting] = await to_thread.run_sync(store.waiting, record.run_id)
        at = form.get("at", ""), form.get("call", "")
        unknown = [
            one
            for one in pending
            if (f"{one.position}:{one.branch}", str(one.call_number)) == at and one.effect
        ]
        try:
            answer = NotDone() if form.get("happened") != "yes" else json.loads(form.get("output", ""))
            stated = match_answer(unknown, record.run_id, answer, node_id=None, branch=None, schema=None)
            await store.signal(record.run_id, stated)
        except (ValidationError, json.JSONDecodeError) as error:
            raise HTTPException(422, f"the output does not fit: {clean(str(error), 1000)}") from error
        except StoreError as error:
            raise HTTPException(409, clean(str(error), 1000)) from error
        return RedirectResponse(f"/run?{urlencode({'id': record.run_id})}", 303)

    async def pause(self, request: Request) -> Response:
        return await self._control("pause", "pause", request)

    async def unpause(self, request: Request) -> Response:
        return await self._control("unpause", "unpause", request)

    async def cancel(self, request: Request) -> Response:
        return await self._control("cancel", "cancel", request)

    async def set_budget(self, request: Request) -> Response:
        return await self._control("budget", "set_budget", request)

    async def _control(self, action: str, method: str, request: Request) -> Response:
        """Make a request about a run, and show its page once the owner of the run has read it."""
        record, form = await self._read_form(action, request)
        arguments = (_read_limits(form),) if action == "budget" else ()
        try:
            done = await make_request(self._settings.store, record.run_id, method, *arguments)
        except StoreError as error:
            raise HTTPException(409, clean(str(error), 1000)) from error
        if not done:
            raise HTTPException(
                409, "nothing was changed: the run has ended, or is not paused; reload its page"
            )
        return RedirectResponse(f"/run?{urlencode({'id': record.run_id})}", 303)

    async def delete(self, request: Request) -> Response:
        record, _ = await self._read_form("delete", request)
        if record.holder is not None:
            raise HTTPException(409, "this run is running; cancel it first")
        await self._settings.store.delete(record.run_id)
        return RedirectResponse("/", 303)

    async def _read_form(self, action: str, request: Request) -> tuple[RunRecord, dict[str, str]]:
        """Return the run of a form, and its fields. Raises HTTPException for a form without a valid key."""
        if request.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
            raise HTTPException(415, "content type must be application/x-www-form-urlencoded")
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MAX_FORM_BYTES:
                raise HTTPException(413, "the form is too large")
        form = dict(parse_qsl(body.decode("utf-8", "replace")))
        run_id = form.get("id", "")
        if not self._keys.is_form(form.get("key", ""), action, run_id):
            raise HTTPException(
                403,
                "the form is not from a page of this server, or the server was restarted; reload the page",
            )
        try:
            record = await to_thread.run_sync(self._settings.store.get_run, run_id)
        except ValueError:
            record = None
        if record is None:
            raise HTTPException(404, "the run does not exist any more")
        return record, form


def _read_limits(form: dict[str, str]) -> Mapping[str, float]:
    """Return the limits of a form; empty fields are none. Raises HTTPException."""
    tokens, cost, latency = (form.get(name, "").strip() for name in ("tokens", "cost_usd", "latency_ms"))
    try:
        return limits_of(
            int(tokens) if tokens else None, float(cost) if cost else None, int(latency) if latency else None
        )
    except ValueError as error:  # pydantic's ValidationError is one.
        raise HTTPException(422, f"not a budget: {clean(str(error), 300)}") from error
