"""The processes of a round on Temporal: workers, which are struck, and the one that begins the runs and judges them.

The diary has a line for each call of a node: ``call RUN PLACE ATTEMPT TOKEN PID NANOSECONDS`` before the node does
anything, ``done`` with the same words when it is about to return, or is cancelled. Every output carries the token of the call that made it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, create_model
from temporalio.api.enums.v1 import EventType
from temporalio.client import Client
from temporalio.service import RPCError
from tests.chaos.worker import Diary, read_diary

from stroma import FailureClass, FailurePolicy, NodeContract, Pipeline, RunConfig, current_node, stroma_node
from stroma.runner import map_over, parallel
from stroma.temporal import TemporalRunner, stroma_worker
from stroma.trace import ExecutionResult, RunStatus, TraceEvent

__all__ = ["NODES", "TOKENS", "run_and_judge", "work"]

MODEL = "gpt-4o-mini"
ITEMS = 4
#: Two of them raise at their first attempt.
FLAKY = ("second", "k")
IN_LINE = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "last")
IN_GROUPS = ("a", "b", "c", "d", "e", "f", "h", "i", "j", "k")
#: A run's nodes: those, and one that runs for each of some items.
NODES = (*IN_LINE, *IN_GROUPS, "item")
GROUPS = 5
COMMITS = len(IN_LINE) + len(IN_GROUPS) + ITEMS + GROUPS
#: What a run costs if every attempt is counted once: 15 for each output, 5 for each failure.
TOKENS = 15 * (COMMITS - GROUPS) + 5 * len(FLAKY)
#: Seconds after which a silent worker is lost.
HEARTBEAT = 2.5
RUN_SECONDS = 240.0


class Item(BaseModel):
    n: int


class Made(BaseModel):
    item: str


State: Any = create_model(
    "State",
    items=(list[int], list(range(ITEMS))),
    made=(list[Made], []),
    **dict.fromkeys((*IN_LINE, *IN_GROUPS), (str, "")),
)
#: What a child of a group gives back, and nothing of its siblings'.
ALONE = {name: create_model(f"Of{name.title()}", **{name: (str, ...)}) for name in IN_GROUPS}  # type: ignore[call-overload]


def pipeline(diary: Diary | None = None, pause: float = 0.0) -> Pipeline:
    """20 nodes and 5 groups. ``pause``: seconds that a node takes at most."""

    def node(name: str, input_model: Any = State, output_model: Any = State) -> Any:
        contract: NodeContract[Any, Any] = NodeContract(
            node_id=name, input_schema=input_model, output_schema=output_model
        )

        @stroma_node(name, contract)
        async def call(state: Any) -> Any:
            here = current_node()
            assert diary is not None
            token = os.urandom(6).hex()
            place = f"{here.position}|{here.branch}"
            what = (here.run_id, place, str(here.attempt), token, str(os.getpid()))
            diary.write("call", *what, str(time.time_ns()))
            try:
                await asyncio.sleep(random.uniform(0, pause))
            finally:  # One that wakes up late may be told so before it is done.
                diary.write("done", *what, str(time.time_ns()))
            if name in FLAKY and here.attempt == 1:
                here.report_usage(input_tokens=3, output_tokens=2, model=MODEL)
                raise TimeoutError(token)
            instance = {"item": token} if name == "item" else {name: token}
            return (
                (instance if output_model is not State else state.model_copy(update=instance)),
                10,
                5,
                MODEL,
            )

        return call

    def child(name: str) -> Any:
        return node(name, output_model=ALONE[name])

    nodes = [
        node("first"), node("second"),
        parallel(child("a"), child("b"), child("c")),
        node("third"), node("fourth"),
        parallel(child("d"), parallel(child("e"), child("f"))),
        node("fifth"), node("sixth"),
        map_over("items", node("item", Item, Made), into="made", max_concurrency=2),
        node("seventh"),
        parallel(child("h"), child("i"), child("j"), child("k"), max_concurrency=2),
        node("eighth"), node("last"),
    ]  # fmt: skip
    quick = {
        kind: FailurePolicy(max_retries=2, backoff_seconds=0.01)
        for kind in (FailureClass.RECOVERABLE, FailureClass.AMBIGUOUS)
    }
    return Pipeline("chaos", nodes, config=RunConfig(policy_map=quick))


async def connect(address: str) -> Client:
    """A client of a server that may be down for a moment."""
    while True:
        try:
            client = await Client.connect(address)
            await client.count_workflows()
            return client
        except (RPCError, RuntimeError):
            await asyncio.sleep(0.05)


def work(address: str, queue: str, diary: str, pause: float) -> None:
    """A worker, until it is killed; SIGTERM ends it as an operator would."""

    async def serve() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        worker = stroma_worker(await connect(address), queue, [pipeline(Diary(diary), pause)])
        async with worker:
            await stop.wait()

    stop = asyncio.Event()
    asyncio.run(serve())


# ---------------------------------------------------------------------- who begins the runs, and judges them


def run_and_judge(
    address: str, queue: str, runs: list[str], diary: str, report_file: str, stopped: int | None = None
) -> None:
    """Begin the runs, wait for their ends, and write what was broken to ``told``.

    ``stopped``: a process that wakes up late. The histories are looked at after it has ended a call to no avail.
    """
    result = asyncio.run(_runs(address, queue, runs, diary, stopped))
    Path(report_file).write_text(json.dumps(result))


async def _runs(address: str, queue: str, runs: list[str], diary: str, stopped: int | None) -> dict[str, Any]:
    client = await connect(address)
    runner = TemporalRunner(
        client, queue, heartbeat_seconds=HEARTBEAT, task_seconds=4.0, redelivery_seconds=0.1
    )
    findings: dict[str, Any] = {"broken": [], "commits": 0, "repeated": 0, "seconds": 0.0}
    started = time.monotonic()
    results = await asyncio.gather(*[_one(runner, run_id) for run_id in runs], return_exceptions=True)
    findings["seconds"] = time.monotonic() - started
    deadline = time.monotonic() + RUN_SECONDS
    while stopped is not None and not _was_late(diary, results, stopped):
        if time.monotonic() > deadline:
            findings["broken"].append(f"process {stopped} ended no call late: this round shows nothing")
            break
        await asyncio.sleep(0.05)
    for run_id, result in zip(runs, results, strict=True):
        if isinstance(result, BaseException):
            findings["broken"].append(f"I5: run {run_id}: {type(result).__name__}: {result}")
            continue
        judge = _Judge(run_id, result, diary, stopped)
        judge.check(await _ended_at(client, run_id))
        again = await runner.trace(pipeline(), run_id)
        if again.final_state != result.final_state or len(again.trace) != len(result.trace):
            judge.bad("I1", "the run has changed since its end")
        findings["broken"] += judge.broken
        findings["commits"] += judge.commits
        findings["repeated"] += judge.repeated
    return findings


async def _one(runner: TemporalRunner, run_id: str) -> ExecutionResult:
    async with asyncio.timeout(RUN_SECONDS):
        while True:
            try:
                return await runner.run(
                    pipeline(), State(), run_id=run_id, if_running="attach", if_exists="return"
                )
            except RPCError:  # The server is down for longer than the client tries.
                await asyncio.sleep(0.1)


def _was_late(diary: str, results: list[Any], pid: int) -> bool:
    """Whether a process has ended a call of which nothing is kept."""
    entries: set[str] = set()
    for result in results:
        if isinstance(result, ExecutionResult):
            entries |= {token for _, token in _tokens(result)}
            entries |= {event.failure_message or "" for event in result.trace.walk()}
    return any(
        kind == "done" and int(who) == pid and token not in entries
        for kind, _, _, _, token, who, _ in read_diary(diary)
    )


def _tokens(result: ExecutionResult) -> list[tuple[str, str]]:
    """Each place with the token of the call that made what is kept there."""
    findings = []
    for event in result.trace.walk():
        token = _token(event)
        if token is not None:
            findings.append((f"{event.position}|{event.branch}", token))
    return findings


def _token(event: TraceEvent) -> str | None:
    if event.output_state is None or event.children:
        return None
    token: str = event.output_state[event.node_id]
    return token


async def _ended_at(client: Client, run_id: str) -> dict[tuple[str, int], int]:
    """When the server took each attempt's end: (place, attempt) to nanoseconds. Raises AssertionError if it did so twice."""
    scheduled: dict[int, tuple[str, int]] = {}
    ended: dict[tuple[str, int], int] = {}
    async for event in client.get_workflow_handle(run_id).fetch_history_events():
        if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED:
            request = json.loads(event.activity_task_scheduled_event_attributes.input.payloads[0].data)
            if request["op"] == "attempt":
                place = f"{request['position']}|{request['branch']}"
                scheduled[event.event_id] = place, request["attempt"]
        elif event.event_type in (
            EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED,
            EventType.EVENT_TYPE_ACTIVITY_TASK_FAILED,
        ):
            completed = event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED
            attributes = (
                event.activity_task_completed_event_attributes
                if completed
                else event.activity_task_failed_event_attributes
            )
            at = scheduled.get(attributes.scheduled_event_id)
            if at is not None:
                assert at not in ended, f"{run_id}: {at} ended twice"
                ended[at] = event.event_time.ToNanoseconds()
    return ended


class _Judge:
    """What a run came to against what the diary says."""

    def __init__(self, run_id: str, result: ExecutionResult, diary: str, stopped: int | None) -> None:
        self.broken: list[str] = []
        self.commits = self.repeated = 0
        self._run_id = run_id
        self._result = result
        self._calls: dict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)
        for kind, run, place, attempt, token, pid, at in read_diary(diary):
            if kind == "call" and run == run_id:
                # One that wakes up with what it was handed before learns at its end that it is too late.
                began = 0 if int(pid) == stopped else int(at)
                self._calls[place, int(attempt)].append((token, began))

    def bad(self, invariant: str, what: str) -> None:
        self.broken.append(f"{invariant}: run {self._run_id}: {what}")

    def check(self, ended: dict[tuple[str, int], int]) -> None:
        result = self._result
        if result.status is not RunStatus.COMPLETED:
            self.bad("I5", f"it is {result.status}: {result.failure and result.failure.message}")
            return
        events = list(result.trace.walk())
        entries = [(event.position, event.branch) for event in events if event.outcome == "success"]
        self.commits = len(set(entries))
        if len(entries) != len(set(entries)) or self.commits != COMMITS:
            self.bad("I2", f"{len(entries)} outputs at {self.commits} places; there are {COMMITS}")
        for place, token in _tokens(result):
            if token not in {
                instance for at, calls in self._calls.items() if at[0] == place for instance, _ in calls
            }:
                self.bad("I1", f"{place}: no call made what is kept, {token}")
        for at, calls in self._calls.items():
            self.repeated += len(calls) - 1
            if at not in ended:
                self.bad("I1", f"{at} was called, and the server knows of no end")
            elif any(began > ended[at] for _, began in calls):
                self.bad("I3", f"{at} was called after its end was kept")
        spent = sum(event.usage.tokens for event in events if not event.children)
        cost = sum(event.usage.cost_usd for event in events if not event.children)
        if not result.total_tokens == spent == TOKENS:
            self.bad("I4", f"{result.total_tokens} tokens, its attempts {spent}; they cost {TOKENS}")
        if not cost or abs(result.total_cost_usd - cost) > 1e-9:
            self.bad("I4", f"{result.total_cost_usd} USD, its attempts {cost}")
