"""The two things that a page can do: go on with a run, and delete one."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlencode

from anyio import to_thread
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from stroma.checkpoint.history import FINISHED
from stroma.checkpoint.records import RunRecord

if TYPE_CHECKING:
    from stroma.ui.security import Keys
    from stroma.ui.settings import Settings

__all__ = ["Actions", "can_resume"]

_LARGEST_FORM = 100_000


def can_resume(settings: Settings, record: RunRecord) -> bool:
    """Whether a page may go on with a run: it is of the pipeline that was given, has not ended well, and is nobody's."""
    return (
        settings.resume is not None
        and record.pipeline == settings.pipeline
        and record.status not in FINISHED
        and record.holder is None
        and record.run_id != "last"  # To the command that is another one.
    )


class Actions:
    """Every form carries what only a page of this process could have given it."""

    def __init__(self, settings: Settings, keys: Keys) -> None:
        self._settings = settings
        self._keys = keys

    async def resume(self, request: Request) -> Response:
        record = await self._asked("resume", request)
        resume = self._settings.resume
        if resume is None or not can_resume(self._settings, record):
            raise HTTPException(409, "this run cannot be resumed from here: see its page for the command")
        await to_thread.run_sync(resume, record.run_id)
        return RedirectResponse(f"/run?{urlencode({'id': record.run_id})}", 303)

    async def delete(self, request: Request) -> Response:
        record = await self._asked("delete", request)
        if record.holder is not None:
            raise HTTPException(409, "somebody is at work on this run: cancel it first")
        await self._settings.store.delete(record.run_id)
        return RedirectResponse("/", 303)

    async def _asked(self, action: str, request: Request) -> RunRecord:
        """The run that a form names. Raises HTTPException for a form that is none of ours."""
        if request.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
            raise HTTPException(415, "this takes the form of its page")
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _LARGEST_FORM:
                raise HTTPException(413, "this form is too large")
        form = dict(parse_qsl(body.decode("utf-8", "replace")))
        run_id = form.get("id", "")
        if not self._keys.is_form(form.get("key", ""), action, run_id):
            raise HTTPException(
                403, "this form is not from a page of this server, or it was started anew: reload the page"
            )
        try:
            record = await to_thread.run_sync(self._settings.store.get_run, run_id)
        except ValueError:
            record = None
        if record is None:
            raise HTTPException(404, "there is no such run any more")
        return record
