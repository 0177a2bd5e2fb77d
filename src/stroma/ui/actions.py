"""Actions of pages: submit, resume, fork, pause, cancel or delete runs, change a budget, send a message."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, urlencode

from anyio import to_thread
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from stroma._utils.access import error_text
from stroma._utils.models import complaints_of
from stroma._utils.text import clean
from stroma.checkpoint.decisions import OPEN
from stroma.checkpoint.errors import RunExists
from stroma.checkpoint.history.facts import is_resumable
from stroma.checkpoint.identity import is_called
from stroma.checkpoint.manager import CheckpointManager
from stroma.checkpoint.records import AttemptRecord, RunRecord
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.examples import NoExampleError, example_for
from stroma.contracts.schema import schema_of
from stroma.runner.stored_runs import StoredRuns, limits_of
from stroma.ui.rendering import Renderer

if TYPE_CHECKING:
    from stroma.ui.security import Keys
    from stroma.ui.settings import Settings, Submission

_MAX_FORM_BYTES: Final = 100_000
#: Actions that are requests about a run, and the methods of stores that make them.
CONTROLS: Final = {"pause": "pause", "unpause": "unpause", "cancel": "cancel", "budget": "set_budget"}
_FORM_SECONDS: Final = 10.0  # for a form to arrive


def can_resume(settings: Settings, record: RunRecord) -> bool:
    """Return True if a page may resume a run: a started, unfinished one without an owner."""
    return (
        settings.served(record).resume is not None
        and is_resumable(record)
        and record.run_id != "last"  # The command would resume the latest run.
    )


def can_fork(settings: Settings, record: RunRecord, attempt: AttemptRecord) -> bool:
    """Return True if a page may fork a run at an attempt: of a node in the list of its pipeline."""
    served = settings.served(record)
    names = [] if served.lineage is None else served.lineage.top_level
    return (
        served.resume is not None
        and not attempt.branch
        and attempt.position < len(names)
        and names[attempt.position] == attempt.node_id
    )


def may_receive(record: RunRecord, attempts: Sequence[AttemptRecord]) -> bool:
    """Return True if a run may take messages: one that goes on, unless it has called nothing as flows do."""
    goes_on = record.status in OPEN
    return goes_on and (not attempts or any(is_called(one.branch) for one in attempts))


def controls_of(record: RunRecord) -> list[str]:
    """Return the requests about a run that a page offers: names of actions."""
    if record.status not in OPEN:
        return ["budget", "cancel"] if record.status == "PARTIAL" else []
    return ["unpause" if record.waits_for == "resume" else "pause", "budget", "cancel"]


class Actions:
    """Handlers of forms, which only accept forms with a key of this process."""

    def __init__(self, settings: Settings, keys: Keys) -> None:
        self._settings = settings
        self._keys = keys
        self.stored = StoredRuns(ContractRegistry(), CheckpointManager(settings.store))

    async def resume(self, request: Request) -> Response:
        record, form = await self.read_form("resume", request)
        resume = self._settings.served(record).resume
        with self._keys.once(identity_of(form)) as is_first:
            if resume is None or (is_first and not can_resume(self._settings, record)):
                raise HTTPException(409, "this run cannot be resumed here; its page shows the command")
            if is_first:
                await to_thread.run_sync(resume, record.run_id)
        return to_run(record.run_id, is_started=True)

    async def fork(self, request: Request) -> Response:
        """Start a new run with what a run has committed before a position."""
        record, form = await self.read_form("fork", request)
        served, position = self._settings.served(record), form.get("position", "")
        resume, lineage = served.resume, served.lineage
        if resume is None or lineage is None:
            raise HTTPException(409, "this run cannot be forked here: pass its pipeline to `stroma ui`")
        is_number = position.isdecimal() and position.isascii() and len(position) < 10
        if not is_number or int(position) >= len(lineage.top_level):
            raise HTTPException(422, "position must be that of a node of the pipeline")
        new_run_id = self._keys.id_of(form["key"], int(position))
        try:
            await self._settings.store.fork(record.run_id, new_run_id, int(position))
        except RunExists:  # The form was sent before.
            return to_run(new_run_id, is_started=True)
        await to_thread.run_sync(resume, new_run_id)
        return to_run(new_run_id, is_started=True)

    async def control(self, action: str, request: Request) -> Response:
        """Make a request about a run, and show its page once the owner of the run has read it."""
        record, form = await self.read_form(action, request)
        arguments = (_read_limits(form),) if action == "budget" else ()
        if not await self.stored.request(record.run_id, CONTROLS[action], *arguments):
            raise HTTPException(
                409, "nothing was changed: the run has ended, or is not paused; reload its page"
            )
        return to_run(record.run_id)

    async def send(self, request: Request) -> Response:
        """Store a message to a run: one message, however often the form is sent."""
        record, form = await self.read_form("send", request)
        message, topic = read_json(form.get("message", ""), "message"), form.get("topic", "")
        message_id = self._keys.id_of(form["key"], identity_of(form))
        try:
            await self.stored.send(record.run_id, message, topic, message_id)
        except (TypeError, ValueError, RecursionError) as error:
            raise HTTPException(422, f"the message cannot be sent: {clean(str(error), 300)}") from error
        return to_run(record.run_id)

    async def delete(self, request: Request) -> Response:
        record, _ = await self.read_form("delete", request)
        if record.holder is not None:
            raise HTTPException(409, "this run is running; cancel it first")
        await self._settings.store.delete(record.run_id)
        return RedirectResponse("/", 303)

    async def read_form(self, action: str, request: Request) -> tuple[RunRecord, dict[str, str]]:
        """Return the run of a form, and its fields. Raises HTTPException for a form without a valid key."""
        form = dict(await read_fields(request))
        run_id = request.state.run_id = form.get("id", "")
        if not self._keys.is_form(form.get("key", ""), action, run_id):
            raise no_key()
        try:
            record = await to_thread.run_sync(self._settings.store.get_run, run_id)
        except ValueError:
            record = None
        if record is None:
            raise HTTPException(404, "the run does not exist any more")
        return record, form


async def read_fields(request: Request) -> list[tuple[str, str]]:
    """Return the fields of a form. Raises HTTPException for anything else, and for too large a one."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
        raise HTTPException(415, "content type must be application/x-www-form-urlencoded")
    body = b""
    try:
        async with asyncio.timeout(_FORM_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > _MAX_FORM_BYTES:
                    raise HTTPException(413, "the form is too large")
    except TimeoutError as error:
        raise HTTPException(408, "the form did not arrive in time") from error
    return parse_qsl(body.decode("utf-8", "replace"))


def to_run(run_id: str, *, is_started: bool = False) -> Response:
    """Lead to the page of a run, which says if a process was started to continue it."""
    query = {"id": run_id} | ({"started": "yes"} if is_started else {})
    return RedirectResponse(f"/run?{urlencode(query)}", 303)


def identity_of(form: dict[str, str] | list[tuple[str, str]]) -> str:
    """Return what tells a form that is sent again from one with other content."""
    return repr(sorted(form.items() if isinstance(form, dict) else form))


def read_json(text: str, what: str) -> Any:
    """Return the JSON in a field of a form. Raises HTTPException for anything else, such as 5,000 digits."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HTTPException(422, f"the {what} is not JSON: {clean(str(error), 300)}") from error


def no_key() -> HTTPException:
    """Return the error for a form without a key of this process."""
    return HTTPException(
        403, "the form is not from a page of this server, or the server was restarted; reload the page"
    )


def _read_limits(form: dict[str, str]) -> Mapping[str, float]:
    """Return the limits of a form; empty fields are none. Raises HTTPException."""
    tokens, cost = form.get("tokens", "").strip(), form.get("cost_usd", "").strip()
    try:
        return limits_of(int(tokens) if tokens else None, float(cost) if cost else None, None)
    except ValueError as error:  # pydantic's ValidationError is one.
        raise HTTPException(422, f"not a budget: {clean(str(error), 300)}") from error


_MAX_ERRORS: Final = 20


class SubmitForm:
    """Handlers of the form and of its submission, which only accept forms with a key of this process."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._keys = renderer.keys

    def page(self, request: Request) -> Response:
        """Return an empty form."""
        name = request.query_params.get("pipeline", next(iter(self._submissions), ""))
        try:
            example = json.dumps(example_for(self._submission(name).model))
        except NoExampleError:
            example = "{}"
        return self._page({"key": self._keys.form("submit", name), "pipeline": name, "input": example})

    async def submit(self, request: Request) -> Response:
        """Submit a run, once for a form and its content, and lead to its page; or show the errors."""
        form = dict(await read_fields(request))
        name = form.get("pipeline", "")
        if not self._keys.is_form(form.get("key", ""), "submit", name):
            raise no_key()
        submission = self._submission(name)
        parsed = _parse(submission.model, form.get("input", ""))
        if isinstance(parsed, list):
            return self._page(form, parsed, 422)
        run_id = self._keys.id_of(form["key"], identity_of(form))
        try:
            await submission.submit(parsed, run_id)
        except (TypeError, ValueError) as error:
            return self._page(form, [("", clean(str(error), 1000))], 422)
        return to_run(run_id)

    @property
    def _submissions(self) -> dict[str, Submission]:
        """The pipelines whose runs can be submitted, by name."""
        pipelines = self._renderer.settings.pipelines.items()
        return {name: one.submission for name, one in pipelines if one.submission is not None}

    def _submission(self, name: str) -> Submission:
        submission = self._submissions.get(name)
        if submission is None:
            raise HTTPException(404, "stroma ui was started without a pipeline that can be submitted")
        return submission

    def _page(
        self, form: dict[str, str], errors: list[tuple[str, str]] | None = None, code: int = 200
    ) -> Response:
        fields = {name: form.get(name, "") for name in ("key", "pipeline", "input")}
        names = list(self._submissions)
        return self._renderer.page(
            "submit.html", code, here="pipeline", form=fields, names=names, errors=errors or []
        )


def _parse(model: type[BaseModel], text: str) -> BaseModel | list[tuple[str, str]]:
    """Return the input in a text, or its errors: each the path of a field, and what is wrong with it."""
    try:
        return schema_of(model).parse(text)
    except ValidationError as error:
        return [(path, clean(message, 300)) for path, message in complaints_of(error)[:_MAX_ERRORS]]
    except Exception as error:  # A validator of the model may raise anything.
        return [("", clean(error_text(error), 300))]
