"""Runs in a journal store: inputs, answers, outputs, requests, and runs to recover or to fork."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import uuid4

from pydantic import BaseModel, ValidationError

from stroma._utils.logs import get_logger, refused_fields
from stroma.checkpoint import (
    CheckpointManager,
    CheckpointNotFound,
    PipelineChanged,
    RequestRefused,
    StoreError,
    Waiting,
    resolve_schema,
)
from stroma.checkpoint.decisions import OPEN, not_waiting
from stroma.checkpoint.entries import NOT_DONE, RunFacts, SentMessage
from stroma.checkpoint.events import EventPage, EventPlace
from stroma.checkpoint.queue import COMPLETE, RunLimits, ServedCode
from stroma.contracts.contract import ContractRegistry, NotDone, Unknown, check_id
from stroma.contracts.node import Group, Node, contract_of_node, find_node, output_class
from stroma.contracts.schema import Schema, schema_of
from stroma.contracts.tagged_json import NotSerialisable
from stroma.cost.budget import ExecutionBudget
from stroma.cost.usage import shown
from stroma.engine.config import RunConfig
from stroma.engine.restore import value_of
from stroma.runner.pipeline import Pipeline, code_of, input_schema_of, nodes_of
from stroma.trace.result import RunStatus

if TYPE_CHECKING:
    from stroma.checkpoint import RunRecord

logger = get_logger()

_OWNER_SECONDS: Final = 10.0  # An owner looks for requests twice a second.
_POLL_SECONDS: Final = (0.01, 0.1)
#: By method, the statuses of a run whose owner may not have read a request.
_UNREAD_IN: Final = {
    "cancel": ("RUNNING", "INTERRUPTED", "SUSPENDED"),
    "pause": ("RUNNING", "INTERRUPTED", "SUSPENDED"),
    "set_budget": ("RUNNING",),
}


def decode_input(run_id: str, schema: Schema, data: bytes) -> BaseModel:
    """Return the stored input of a run. Raises PipelineChanged if its class no longer accepts it."""
    try:
        return schema.decode(data)
    except ValidationError as error:
        why = refused_fields(error)  # Without the values, which the exception would show as its cause.
    raise PipelineChanged(
        f"the input of run {run_id!r} is not a {schema.model.__name__}: {why}; restore its schema"
    )


def limits_of(tokens: int | None, cost_usd: float | None, latency_ms: int | None) -> Mapping[str, float]:
    """Return limits by field of ExecutionBudget. Raises ValueError, also pydantic's ValidationError."""
    budget = ExecutionBudget(max_tokens_total=tokens, max_cost_usd=cost_usd, max_latency_ms=latency_ms)
    limits: dict[str, float] = budget.model_dump(exclude_none=True)
    if not limits:
        raise ValueError("no limit is set; pass tokens=, cost_usd= or latency_ms=")
    return limits


async def request(store: Any, run_id: str, method: str, *arguments: Any) -> bool:
    """Call a method of a store about a run, and wait until the owner of the run has read the request.

    Returns what the method does; False for a cancel of a run that completed meanwhile. A stored request
    holds, whatever becomes of the owner. An owner that has not read it in 10 seconds is not waited for any
    longer: its process is stopped, or it is plain code that reads no requests. Raises CheckpointNotFound,
    StoreError.
    """
    done: bool = await getattr(store, method)(run_id, *arguments)
    loop = asyncio.get_running_loop()
    late, pause = loop.time() + _OWNER_SECONDS, _POLL_SECONDS[0]
    while done and await asyncio.to_thread(store.is_request_pending, run_id):
        if loop.time() > late:
            logger.warning(
                "the owner of run %r has not read the request, and may begin further attempts; "
                "the request is stored, and holds when the run is opened again",
                run_id,
            )
            return done
        await asyncio.sleep(pause)
        pause = min(2 * pause, _POLL_SECONDS[1])
    record = await asyncio.to_thread(store.get_run, run_id) if done and method in _UNREAD_IN else None
    if record is not None and record.holder is None and record.status in _UNREAD_IN[method]:
        # The owner stopped instead of reading it, or lost its lease: what the request does to a run without
        # an owner is done now, and not when somebody opens the run.
        try:
            await getattr(store, method)(run_id, *arguments)
        except CheckpointNotFound:
            pass
    has_ended = record is not None and record.holder is None and record.status in COMPLETE
    return done and not (has_ended and method == "cancel")


_MAX_NAMED: Final = 10  # questions in a message


def match_answer(
    questions: Sequence[Waiting],
    run_id: str,
    answer: Any,
    *,
    question: str | None,
    schema: type[BaseModel] | None,
    secrets: bool = False,
) -> Waiting:
    """Return the question that an answer is for, with the answer validated and encoded.

    ``questions``: the questions of the run, answered ones too. ``secrets``: the answer may have secrets.
    Raises pydantic's ValidationError; RequestRefused if no question is open or the class of the answer is not
    imported; ValueError if the id of the question is needed, or the answer is of another kind.
    """
    waiting = _find(questions, run_id, answer, question)
    if isinstance(answer, (NotDone, Unknown)):
        if waiting.effect is None:
            raise ValueError(
                f"question {waiting.id!r} of run {run_id!r} is not about the call of an effect; answer it"
            )
        if isinstance(answer, Unknown):
            raise ValueError(
                f"node {waiting.node_id!r} of run {run_id!r} is suspended until its call is known; "
                "pass its output, or NotDone()"
            )
        return waiting._replace(payload=NOT_DONE)
    expected = schema_of(schema or _class_of(waiting, answer))
    is_model = isinstance(answer, BaseModel) and waiting.schema_ref
    model = expected.convert(answer) if is_model else expected.validate(answer)
    return waiting._replace(payload=expected.encode(model, secrets=secrets))


def encode_message(message: Any, *, secrets: bool) -> bytes:
    """Return a message in stored form. Raises NotSerialisable if it has none."""
    if isinstance(message, BaseModel):
        schema = schema_of(type(message))
        return schema.encode(schema.convert(message), secrets=secrets)
    # The space tells it from a model in stored form.
    try:
        return b" " + json.dumps(message, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise NotSerialisable(
            f"a message must be a model or JSON data, got {shown(message)}: {error}"
        ) from None


def _find(questions: Sequence[Waiting], run_id: str, answer: Any, question: str | None) -> Waiting:
    """Return the question with an id, or the open one. Raises RequestRefused, ValueError."""
    if question is not None:
        named = next((one for one in questions if one.id == question), None)
        if named is None:
            place = question.rpartition(":")[0]
            at_place = (one for one in questions if one.id.rpartition(":")[0] == place)
            raise not_waiting(run_id, question, next(at_place, None))
        return named
    waiting = [one for one in questions if one.payload is None]
    if not waiting:
        raise RequestRefused(f"run {run_id!r} has no open question; check its status and its attempts")
    is_statement = isinstance(answer, (NotDone, Unknown))
    # A statement is about one call: by now the open question may be about another one.
    taking = [one for one in waiting if one.effect is None and not is_statement]
    if len(taking) == 1:
        return taking[0]
    names = ", ".join(f"{one.id!r} of {one.node_id!r}" for one in (taking or waiting)[:_MAX_NAMED])
    why = f"has {len(taking)} open questions"
    if not taking:
        is_about_effect = any(one.effect for one in waiting)
        why = (
            "needs a statement that names its call"
            if is_about_effect
            else "is not asked about the call of an effect"
        )
    raise ValueError(f"run {run_id!r} {why}; pass question= with the id of one: {names}")


def _class_of(waiting: Waiting, answer: Any) -> type[BaseModel]:
    """Return the class that an answer must satisfy. Raises RequestRefused if it is not imported."""
    if not waiting.schema_ref:
        return output_class(None)
    if (
        isinstance(answer, BaseModel)
        and waiting.schema
        and schema_of(type(answer)).json_schema == waiting.schema
    ):
        return type(answer)  # The class, or the same one by another name of its module.
    try:
        return resolve_schema(waiting.schema_ref)
    except (LookupError, TypeError) as error:
        raise RequestRefused(
            f"question {waiting.id!r} of {waiting.node_id!r} needs a {waiting.schema_ref}: {error}; "
            "or pass that class as schema="
        ) from error


_MAX_RECOVERED = 1_000_000  # runs of one status
_MAX_COUNTED = 1_000  # likewise
_PAGE_ITEMS = 200  # outputs of a map that are read at once


class ServedPipeline(NamedTuple):
    """Nodes whose runs are continued, and the schema of their input."""

    nodes: Pipeline | list[Any]
    schema: Schema
    limits: RunLimits = RunLimits()
    code: ServedCode = ServedCode()


def no_run(run_id: str) -> CheckpointNotFound:
    """Return the error for a run that is not in the store."""
    return CheckpointNotFound(f"there is no run {run_id!r} in the store; check the id and the store")


class StoredRuns:
    """The runs in the store of a runner. Every method raises StoreError if the store has no journal."""

    def __init__(self, registry: ContractRegistry, manager: CheckpointManager) -> None:
        self._registry = registry
        self.store: Any = manager.store

    def journal(self, method: str) -> Any:
        """Return the store. Raises StoreError if it does not have a method of journal stores."""
        if not hasattr(self.store, method):
            kind = type(self.store).__name__
            raise StoreError(f"{kind} has no journal of runs; use a journal store such as SQLiteStore")
        return self.store

    async def _read(self, method: str, run_id: str) -> Any:
        """Call a blocking method of the journal about a run. Raises CheckpointNotFound without any run."""
        store = self.journal(method)

        def read() -> Any:
            if not store.exists():  # The first run creates a store.
                raise no_run(run_id)
            return getattr(store, method)(run_id)

        return await asyncio.to_thread(read)

    async def get(self, run_id: str) -> RunRecord:
        """Return a run. Raises CheckpointNotFound."""
        record: RunRecord | None = await self._read("get_run", run_id)
        if record is None:
            raise no_run(run_id)
        return record

    async def read_questions(self, run_id: str) -> list[Waiting]:
        """Return the questions of a run, answered ones too."""
        waiting: list[Waiting] = await self._read("waiting", run_id)
        return waiting

    def read_events(self, run_id: str, after: EventPlace, limit: int) -> EventPage:
        """Return the next stored events of a run after a place. Blocking. Raises CheckpointNotFound."""
        store = self.journal("read_events")
        page: EventPage | None = store.read_events(run_id, after, limit) if store.exists() else None
        if page is None:
            raise no_run(run_id)
        return page

    async def read_final_state(self, record: RunRecord) -> Any:
        """Return the last output of a run as plain data, else its input; None if it cannot be read."""
        from stroma.checkpoint.history.redaction import decode_payload

        store = self.journal("output_of")

        def read() -> Any:
            try:
                if record.nodes:
                    data = store.output_of(record.run_id, record.nodes - 1, execution=record.execution)
                else:
                    data = store.input_of(record.run_id)
            except (StoreError, NotSerialisable):
                return None
            return None if data is None else decode_payload(data, None).value

        return await asyncio.to_thread(read)

    async def count_failed_items(self, run_id: str) -> int:
        """Return how many items of the maps of a run that has ended failed."""
        facts: RunFacts = await self._read("facts_of", run_id)
        return facts.failed_items

    def served(self, pipelines: Sequence[Any]) -> dict[str, ServedPipeline]:
        """Return these flows and pipelines by name. Raises ValueError for two of one name, TypeError."""
        served: dict[str, ServedPipeline] = {}
        for one in pipelines:
            if not isinstance(one, Pipeline):
                raise TypeError(
                    f"runs are found by the name of their pipeline, got {type(one).__name__}; pass a flow or "
                    "Pipeline(name, nodes)"
                )
            if one.name in served and served[one.name].nodes is not one:
                raise ValueError(f"two pipelines have the name {one.name!r}; use distinct names")
            served[one.name] = ServedPipeline(
                one, input_schema_of(nodes_of(one), self._registry), one.limits, code_of(one)
            )
        return served

    async def read_input(self, run_id: str, schema: Schema) -> BaseModel:
        """Return the original input of a run. Raises CheckpointNotFound, and as :func:`decode_input`."""
        return decode_input(run_id, schema, await self._read("input_of", run_id))

    async def load_input(self, run_id: str, schema: Schema) -> BaseModel:
        """Return the same as :meth:`read_input`, for a run that is about to be opened."""
        return decode_input(run_id, schema, await self.journal("load_input").load_input(run_id))

    async def read_map(self, run_id: str, node: Any) -> AsyncIterator[tuple[int, Any]]:
        """Yield the outputs of a map; see :meth:`StromaRunner.map_outputs`."""
        group = find_node(node)
        if not isinstance(group, Group) or not group.is_map or group.output_field:
            raise TypeError(
                f"{group.node_id!r} is not a map whose outputs are in the journal; pass the map_over() with "
                "into=Journal() or JsonLines(path)"
            )
        store = self.journal("map_items")
        first = 0
        while page := await asyncio.to_thread(store.map_items, run_id, group.node_id, first, _PAGE_ITEMS):
            for index, committed in page:
                yield index, value_of(self._registry, group.children[0], committed)
            first += _PAGE_ITEMS

    async def _list(self, pipeline: str, statuses: Sequence[str], limit: int) -> list[RunRecord]:
        """Return the newest runs of a pipeline of each status."""
        store = self.journal("list_runs")
        runs: list[RunRecord] = []
        for status in statuses if store.exists() else ():  # The first run creates a store.
            runs += await asyncio.to_thread(store.list_runs, limit=limit, pipeline=pipeline, status=status)
        return runs

    async def find_interrupted(self, pipeline: str, versions: Sequence[str]) -> list[str]:
        """Return the ids of runs of a pipeline, of these versions or none, without an owner and an end."""
        if pipeline == RunConfig.model_fields["pipeline"].default:
            logger.warning(
                "recover() finds runs by the name of their pipeline, and this one has the default name: it "
                "recovers the runs of other unnamed pipelines too; name it with Pipeline(name, nodes) or "
                "RunConfig(pipeline=...)"
            )
        runs = await self._list(pipeline, ("RUNNING", RunStatus.INTERRUPTED.value), _MAX_RECOVERED)
        return [one.run_id for one in runs if one.holder is None and one.version in (None, *versions)]

    async def count_unserved(self, pipeline: str, versions: Sequence[str]) -> dict[str, int]:
        """Return how many of the newest unfinished runs of a pipeline have each version but these."""
        runs = await self._list(pipeline, OPEN, _MAX_COUNTED)
        counts = Counter(
            one.version for one in runs if one.version is not None and one.version not in versions
        )
        return dict(sorted(counts.items()))

    async def fork(
        self,
        run_id: str,
        fork_id: str,
        nodes: list[Node | Group],
        position: int,
        state: BaseModel | None,
        call: str | None = None,
    ) -> None:
        """Record a run that continues another one at a position, or at a call of the flow there.

        ``state`` is the input of the position, and replaces the output before it, which may be missing; with
            ``call`` it is the output of that call.
        """
        from stroma.contracts.untyped import UntypedState  # Root models load slowly.

        replaced: dict[str, Any] = {}
        if state is not None:
            schema = schema_of(type(state))
            last = nodes[position - 1] if position and call is None else None
            if isinstance(last, Node):
                contract = contract_of_node(last, self._registry)
                schema = schema_of(output_class(contract))
                replaced["edited_node"] = last.node_id
            value = (
                UntypedState(schema_of(type(state)).raw(state))
                if schema.model is UntypedState
                else schema.convert(state)
            )
            replaced["edited" if position or call is not None else "state"] = (schema, value)
        await self.journal("fork").fork(run_id, fork_id, position, call=call, **replaced)

    async def answer(
        self, run_id: str, answer: Any, question: str | None, schema: type[BaseModel] | None
    ) -> None:
        """Store the answer to a question; see :meth:`StromaRunner.signal`."""
        store = self.journal("signal")
        questions = await self.read_questions(run_id)
        if not questions:
            await self.get(run_id)
        secrets = store.keeps_secrets
        waiting = match_answer(questions, run_id, answer, question=question, schema=schema, secrets=secrets)
        await store.signal(run_id, waiting)

    async def send(self, run_id: str, message: Any, topic: str, message_id: str | None) -> None:
        """Store a message to a run; see :meth:`StromaRunner.send`."""
        store = self.journal("send")
        payload = encode_message(message, secrets=store.keeps_secrets)
        if topic != "":
            check_id(topic, "topic")
        message_id = uuid4().hex if message_id is None else check_id(message_id, "message id")
        await store.send(run_id, SentMessage(0, topic, message_id, payload))

    async def request(self, run_id: str, method: str, *arguments: Any) -> bool:
        """Cancel, pause, unpause or change the budget of a run; see :func:`request`."""
        return await request(self.journal(method), run_id, method, *arguments)
