"""Runs in a journal store: their inputs, answers and outputs, and the runs that can be recovered or forked."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from pydantic import BaseModel

from stroma._utils.logs import get_logger
from stroma.checkpoint import CheckpointManager, CheckpointNotFound, StoreError, Waiting
from stroma.checkpoint.decisions import UNFINISHED
from stroma.checkpoint.entries import RunRequest, SentMessage
from stroma.checkpoint.events import EventPage, EventPlace
from stroma.checkpoint.queue import (
    Candidate,
    ClaimRequest,
    QueueEntry,
    QueueFigures,
    RunLimits,
    ServedCode,
)
from stroma.contracts.contract import ContractRegistry, check_id
from stroma.contracts.node import Group, Node, find_node, output_class
from stroma.contracts.schema import Schema, schema_of
from stroma.contracts.tagged_json import NotSerialisable
from stroma.engine.config import RunConfig
from stroma.engine.restore import value_of
from stroma.runner.code import code_of
from stroma.runner.flows.suspension import now_ms
from stroma.runner.pipeline import Pipeline, input_schema_of, nodes_of
from stroma.runner.requests import limits_of, request
from stroma.runner.signals import encode_message, match_answer
from stroma.trace.result import RunStatus

if TYPE_CHECKING:  # Loaded with a durable store.
    from stroma.checkpoint import RunRecord
    from stroma.checkpoint.durable.news import Listener

__all__ = ["ServedPipeline", "StoredRuns", "no_run"]

logger = get_logger()

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
        self._manager = manager

    @property
    def store(self) -> Any:
        """The store."""
        return self._manager.store

    def _journal(self, method: str) -> Any:
        store = self._manager.store
        if not hasattr(store, method):
            raise StoreError(
                f"{type(store).__name__} has no journal of runs; use a journal store such as SQLiteStore"
            )
        return store

    def input_schema(self, nodes: list[Node | Group], input_class: type[BaseModel] | None) -> Schema:
        """Return the schema of the input of a run of these nodes. Raises TypeError if they start with a group."""
        return input_schema_of(nodes, self._registry) if input_class is None else schema_of(input_class)

    async def get(self, run_id: str) -> RunRecord:
        """Return a run. Raises CheckpointNotFound."""
        record: RunRecord | None = await asyncio.to_thread(self._journal("get_run").get_run, run_id)
        if record is None:
            raise no_run(run_id)
        return record

    async def read_questions(self, run_id: str) -> list[Waiting]:
        """Return the questions of a run, answered ones too."""
        waiting: list[Waiting] = await asyncio.to_thread(self._journal("waiting").waiting, run_id)
        return waiting

    def read_events(self, run_id: str, after: EventPlace, limit: int) -> EventPage:
        """Return the next stored events of a run after a place. Blocking. Raises CheckpointNotFound."""
        store = self._journal("read_events")
        page: EventPage | None = store.read_events(run_id, after, limit) if store.exists() else None
        if page is None:
            raise no_run(run_id)
        return page

    async def read_final_state(self, record: RunRecord) -> Any:
        """Return the last output at the top level of a run as plain data, its input before the first one; None if unreadable."""
        from stroma.checkpoint.history.payload import decode_payload

        store = self._journal("output_of")

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

    def served(self, pipelines: Sequence[Any]) -> dict[str, ServedPipeline]:
        """Return these flows and pipelines by name. Raises ValueError for two of one name, TypeError for anything else."""
        served: dict[str, ServedPipeline] = {}
        for one in pipelines:
            if not isinstance(one, Pipeline):
                raise TypeError(
                    f"runs are found by the name of their pipeline, got {type(one).__name__}; pass a flow or "
                    "Pipeline(name, nodes)"
                )
            if one.name in served and served[one.name].nodes is not one:
                raise ValueError(f"two pipelines have the name {one.name!r}; use distinct names")
            schema = self.input_schema(nodes_of(one), None)
            served[one.name] = ServedPipeline(one, schema, one.limits, code_of(one))
        return served

    async def read_input(self, run_id: str, schema: Schema) -> BaseModel:
        """Return the original input of a run."""
        data: bytes = await asyncio.to_thread(self._journal("input_of").input_of, run_id)
        return schema.decode(data)

    async def read_map(self, run_id: str, node: Any) -> AsyncIterator[tuple[int, Any]]:
        """Yield the outputs of a map; see :meth:`StromaRunner.map_outputs`."""
        group = find_node(node)
        if not isinstance(group, Group) or not group.is_map or group.output_field:
            raise TypeError(
                f"{group.node_id!r} is not a map whose outputs are in the journal; pass the map_over() with into=Journal() or "
                "JsonLines(path)"
            )
        store = self._journal("map_items")
        first = 0
        while page := await asyncio.to_thread(store.map_items, run_id, group.node_id, first, _PAGE_ITEMS):
            for index, committed in page:
                yield index, value_of(self._registry, group.children[0], committed)
            first += _PAGE_ITEMS

    async def find_interrupted(self, pipeline: str, versions: Sequence[str]) -> list[str]:
        """Return the ids of the runs of a pipeline, of these versions or none, that have no owner and no end."""
        if pipeline == RunConfig.model_fields["pipeline"].default:
            logger.warning(
                "recover() finds runs by the name of their pipeline, and this one has the default name: it recovers the runs "
                "of other unnamed pipelines too; name it with Pipeline(name, nodes) or RunConfig(pipeline=...)"
            )
        store = self._journal("list_runs")
        run_ids: list[str] = []
        if not getattr(store, "exists", lambda: True)():  # A store that the first run creates.
            return run_ids
        for status in ("RUNNING", RunStatus.INTERRUPTED.value):
            runs = await asyncio.to_thread(
                store.list_runs, limit=_MAX_RECOVERED, pipeline=pipeline, status=status
            )
            run_ids += [
                run.run_id
                for run in runs
                if run.holder is None and (run.version is None or run.version in versions)
            ]
        return run_ids

    async def submit(self, request: RunRequest, entry: QueueEntry) -> bool:
        """Create a QUEUED run. Return False if it exists already. Raises RunExists for another pipeline or input."""
        is_new: bool = await self._journal("submit").submit(request, entry)
        return is_new

    def require_queue(self) -> None:
        """Raise StoreError if the store has no queue of runs."""
        self._journal("claim")

    async def claim(self, request: ClaimRequest) -> list[Candidate]:
        """Claim due runs for a worker."""
        claimed: list[Candidate] = await self._journal("claim").claim(request)
        return claimed

    def listen(self, on_news: Callable[[], None]) -> Listener | None:
        """Call a function, in another thread, when another process has made a run due; None if the store cannot tell."""
        listen = getattr(self._manager.store, "listen", None)
        listener: Listener | None = None if listen is None else listen(on_news)
        return listener

    async def postpone(self, run_id: str, token: str, due_ms: int) -> None:
        """Give back a claimed run until a time in ms since the epoch."""
        await self._journal("postpone").postpone(run_id, token, due_ms)

    async def block(self, run_id: str, message: str, code: ServedCode, token: str | None) -> None:
        """Mark a run as blocked for code that cannot continue it, and give a claim back."""
        await self._journal("block").block(run_id, message, code.name, token, now_ms())

    async def count_unserved(self, pipeline: str, versions: Sequence[str]) -> dict[str, int]:
        """Return how many unfinished runs of a pipeline have each version but these, among the newest of each status."""
        store = self._journal("list_runs")
        counts: Counter[str] = Counter()
        if getattr(store, "exists", lambda: True)():
            for status in ("RUNNING", *UNFINISHED):
                runs = await asyncio.to_thread(
                    store.list_runs, limit=_MAX_COUNTED, pipeline=pipeline, status=status
                )
                counts.update(run.version for run in runs if run.version not in (None, *versions))
        return dict(sorted(counts.items()))

    async def statuses(self, run_ids: list[str]) -> dict[str, str]:
        """Return the statuses of these runs by id, without unknown ones."""
        statuses: dict[str, str] = await asyncio.to_thread(self._journal("statuses").statuses, run_ids)
        return statuses

    async def queue_figures(
        self, served: Mapping[str, ServedPipeline], now_ms: int
    ) -> dict[str, QueueFigures]:
        """Return the figures of the queues of these pipelines at a time in ms since the epoch."""
        read = self._journal("queue_figures").queue_figures
        code = {name: one.code for name, one in served.items()}
        figures: dict[str, QueueFigures] = await asyncio.to_thread(read, code, now_ms)
        return figures

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

        ``state`` replaces the recorded input of the position.
        """
        from stroma.contracts.untyped import UntypedState  # Root models load slowly.

        replaced: dict[str, tuple[Schema, BaseModel]] = {}
        if state is not None:
            schema = schema_of(type(state))
            last = nodes[position - 1] if position else None
            if isinstance(last, Node):
                contract = self._registry.find(last.node_id) or last.contract
                schema = schema_of(output_class(contract))
            value = (
                UntypedState(schema_of(type(state)).raw(state))
                if schema.model is UntypedState
                else schema.convert(state)
            )
            replaced["edited" if position else "state"] = (schema, value)
        await self._journal("fork").fork(run_id, fork_id, position, call=call, **replaced)

    async def answer(
        self,
        run_id: str,
        answer: Any,
        *,
        question: str | None,
        schema: type[BaseModel] | None,
    ) -> None:
        """Store the answer to a question; see :meth:`StromaRunner.signal`."""
        store = self._journal("signal")
        questions = await self.read_questions(run_id)
        if not questions:
            await self.get(run_id)
        answered = match_answer(questions, run_id, answer, question=question, schema=schema)
        await store.signal(run_id, answered)

    async def send(self, run_id: str, message: Any, topic: str, message_id: str | None) -> None:
        """Store a message to a run; see :meth:`StromaRunner.send`."""
        store = self._journal("send")
        payload = encode_message(message)
        if topic != "":
            check_id(topic, "topic")
        message_id = uuid4().hex if message_id is None else check_id(message_id, "message id")
        await store.send(run_id, SentMessage(0, topic, message_id, payload))

    async def cancel(self, run_id: str) -> bool:
        """End a run; see :meth:`StromaRunner.cancel`."""
        return await request(self._journal("cancel"), run_id, "cancel")

    async def pause(self, run_id: str) -> bool:
        """Suspend a run; see :meth:`StromaRunner.pause`."""
        return await request(self._journal("pause"), run_id, "pause")

    async def unpause(self, run_id: str) -> bool:
        """Take a pause back; see :meth:`StromaRunner.unpause`."""
        return await request(self._journal("unpause"), run_id, "unpause")

    async def set_budget(
        self, run_id: str, *, tokens: int | None, cost_usd: float | None, latency_ms: int | None
    ) -> bool:
        """Change limits of a run; see :meth:`StromaRunner.set_budget`."""
        return await request(
            self._journal("set_budget"), run_id, "set_budget", limits_of(tokens, cost_usd, latency_ms)
        )
