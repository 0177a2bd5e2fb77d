"""Moves a run through its plan. Deterministic: all that it learns of the world comes through its driver.

So it may run where code is replayed (a Temporal workflow), and it can be given its state back at any of its safe points.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final, NotRequired, Protocol, TypedDict

from stroma.cost import CostTracker, ExecutionBudget
from stroma.failures import FailureClass, Stop, follow_up
from stroma.remote._crew import Crew
from stroma.remote.plans import policies_of
from stroma.remote.wire import (
    ROOM,
    Answer,
    Event,
    Failed,
    NodeSpec,
    Operation,
    Plan,
    Reply,
    Report,
    Request,
    Spent,
    Value,
    failure_of,
    size_of,
)
from stroma.trace import RunStatus

__all__ = ["Continue", "Driver", "Interpreter", "State", "new_state", "next_segment"]

#: Items of a map whose states are asked for at once, and how many run at once where nobody says.
PAGE: Final = 200
FAN_OUT: Final = 64
#: Bytes of rows and outputs of items from which they are packed together.
_PACK: Final = 128 * 1024
_RESERVE: Final = 192 * 1024  # of the run's room, for the page of items that is under way
_ROW: Final = 400  # bytes of a row, its states apart


class Driver(Protocol):
    """What moves an interpreter: the only thing that it knows of the world."""

    async def call(self, request: Request) -> tuple[Reply, bool]:
        """Have a worker do something; what came of it, and whether the run was cancelled meanwhile.

        Raises CancelledError if it was cancelled before a worker took it up.
        """
        ...

    async def sleep(self, seconds: float) -> None: ...

    def draw(self) -> float:
        """A number from 0 to 1; the same one when the run is replayed."""
        ...

    def full(self) -> bool:
        """Whether the driver would like to go on with a fresh history."""
        ...


class Continue(Exception):
    """The driver asked for it: go on with the state as it is, in a new interpreter."""


class _Broken(Exception):
    """A programming error that ends the run."""


class _MapState(TypedDict):
    """How far a map is. ``next``: the first item that was not asked for. Items in ``packs`` are in nothing else."""

    next: int
    outputs: dict[str, Value]
    rows: list[Event]
    packs: list[Value]
    old_packs: list[Value]
    packed: list[int]
    failures: list[dict[str, Any]]
    busy: list[list[int]]
    attempt: int
    opened_ns: int


class State(TypedDict):
    """Where a run stands. All of it is plain JSON data."""

    position: int
    value: Value
    initial: Value
    begun: bool
    continued: bool
    segment: int
    spent: Spent
    prior: Spent
    rows: list[Event]
    committed: list[Value]
    done: dict[str, Value]
    maps: dict[str, _MapState]
    context: dict[str, Any]
    gone: list[str]
    warned: list[str]
    unpriced: list[str]
    hook_errors: list[list[Any]]
    traceparent: str | None
    waiting: dict[str, Answer]
    answers: dict[str, Answer]
    failed_items: int
    room: int
    resumed_from: NotRequired[str]


def _nothing() -> Spent:
    return {"tokens": 0, "cost_usd": 0.0, "latency_ms": 0.0}


def new_state(value: Value, *, context: dict[str, Any], traceparent: str | None = None) -> State:
    """The state of a run that begins."""
    return {
        "position": 0,
        "value": value,
        "initial": value,
        "begun": False,
        "continued": False,
        "segment": 0,
        "spent": _nothing(),
        "prior": _nothing(),
        "rows": [],
        "committed": [],
        "done": {},
        "maps": {},
        "context": context,
        "gone": [],
        "warned": [],
        "unpriced": [],
        "hook_errors": [],
        "traceparent": traceparent,
        "waiting": {},
        "answers": {},
        "failed_items": 0,
        "room": ROOM - size_of(value),
    }


def next_segment(state: State) -> State:
    """Make a state ready to go on after a suspension, or where an earlier run has stopped."""
    spent, prior = state["spent"], state["prior"]
    state["prior"] = {
        "tokens": prior["tokens"] + spent["tokens"],
        "cost_usd": prior["cost_usd"] + spent["cost_usd"],
        "latency_ms": prior["latency_ms"] + spent["latency_ms"],
    }
    state["spent"] = _nothing()
    state["rows"] = []
    state["hook_errors"], state["unpriced"], state["warned"] = [], [], []
    state["waiting"] = {}
    state["failed_items"] = 0
    state["begun"], state["continued"] = False, True
    state["segment"] += 1
    for progress in state["maps"].values():
        progress["old_packs"] += progress["packs"]
        progress["rows"], progress["packs"] = [], []
        progress["opened_ns"] = 0
    return state


@dataclass(frozen=True, slots=True)
class _Stopped:
    """An execution that stopped for good; the plain form of the engine's Halt."""

    failure: Failed
    output: Value | None = None
    partial: bool = False
    spent: bool = False
    suspended: bool = False


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a node stands."""

    spec: NodeSpec
    path: tuple[int, ...]
    position: int
    branch: str
    groups: tuple[str, ...]
    rows: list[Event]
    kind: str = "node"

    @property
    def key(self) -> str:
        return f"{self.position}|{self.branch}"

    def child(self, index: int, spec: NodeSpec, number: int, rows: list[Event], kind: str) -> _Place:
        branch = f"{self.branch}.{index}" if self.branch else str(index)
        groups = (*self.groups, self.spec["id"])
        return _Place(spec, (*self.path, number), self.position, branch, groups, rows, kind)


class Interpreter:
    """One run. ``state`` is always as far as the run is; between two awaits of the driver it is whole."""

    def __init__(self, plan: Plan, state: State, driver: Driver) -> None:
        self.plan = plan
        self.state = state
        self.driver = driver
        self._policies = policies_of(plan["policies"])
        self._node_policies = {node: policies_of(given) for node, given in plan["node_policies"].items()}
        self._budget = ExecutionBudget(**(plan["settings"].get("budget") or {}))
        self._tracker = tracker = CostTracker()
        spent, prior = state["spent"], state["prior"]
        tracker.spend(spent["tokens"], spent["cost_usd"])
        tracker.latency_ns = round(spent["latency_ms"] * 1e6)
        tracker.prior_tokens = prior["tokens"]
        tracker.prior_cost_usd = prior["cost_usd"]
        tracker.prior_latency_ms = prior["latency_ms"]
        #: What the run has come to in this segment; None while it is under way.
        self.status: RunStatus | None = None
        self._failure: Failed | None = None
        self._broken: list[str] | None = None

    # ------------------------------------------------------------------ a segment

    async def go(self) -> Report:
        """Run until the run ends or waits for a person. Raises Continue. Cancelled, it ends as CANCELLED."""
        state = self.state
        self.status, self._failure, self._broken = None, None, None
        cancelled = False
        try:
            if not state["begun"]:
                await self._begin()
            status = await self._positions()
        except asyncio.CancelledError:
            status, cancelled = RunStatus.CANCELLED, True
        except _Broken:
            status = RunStatus.INTERRUPTED
        self.status = status
        try:
            reply, late = await self.driver.call(self._request("end", report=self.report()))
            self._note(reply)
            cancelled |= late
        except asyncio.CancelledError:
            pass  # It has ended; only the hooks may not know.
        except _Broken:
            pass
        return self.report()

    async def _begin(self) -> None:
        state, nodes = self.state, self.plan["nodes"]
        skipped: list[dict[str, Any]] = []
        for position, value in enumerate(state["committed"]):
            skipped.append({"spec": nodes[position], "value": value, "position": position, "branch": ""})
        reply, cancelled = await self.driver.call(
            self._request("begin", value=state["initial"], nodes=nodes, skipped=skipped)
        )
        state["traceparent"] = reply.get("traceparent")
        state["begun"] = True
        self._note(reply)
        if "failure" in reply:  # No worker could begin it.
            self._failure = reply["failure"]
        if cancelled:
            raise asyncio.CancelledError

    async def _positions(self) -> RunStatus:
        state, nodes = self.state, self.plan["nodes"]
        if self._failure is not None:
            return RunStatus.PARTIAL
        while state["position"] < len(nodes):
            position = state["position"]
            place = _Place(nodes[position], (position,), position, "", (), state["rows"])
            outcome = await self._execute(place, state["value"])
            output = outcome.output if isinstance(outcome, _Stopped) else outcome
            if output is not None:
                state["committed"].append(output)
                state["value"] = output
                state["position"] = position + 1
                self._forget(position)
            if isinstance(outcome, _Stopped):
                return self._stopped_as(outcome)
            if self.driver.full() and state["position"] < len(nodes):
                raise Continue
        return RunStatus.RESUMED if state["continued"] else RunStatus.COMPLETED

    def _stopped_as(self, outcome: _Stopped) -> RunStatus:
        if outcome.suspended:
            return RunStatus.SUSPENDED
        self._failure = outcome.failure
        terminal = outcome.failure["failure_class"] == FailureClass.TERMINAL and not outcome.partial
        return RunStatus.FAILED if terminal else RunStatus.PARTIAL

    def _forget(self, position: int) -> None:
        prefix = f"{position}|"
        for kept in (self.state["done"], self.state["maps"], self.state["answers"]):
            for key in [key for key in kept if key.startswith(prefix)]:
                del kept[key]

    def report(self) -> Report:
        """What this segment of the run has come to so far."""
        state = self.state
        values: list[Value] = []
        seen: dict[tuple[str, str], int] = {}

        def number(value: Value | None) -> int | None:
            if value is None:
                return None
            key = (value.get("text") or value.get("blob") or "", str(value["cls"]))
            if key not in seen:
                seen[key] = len(values)
                values.append(value)
            return seen[key]

        def numbered(rows: list[Event]) -> list[dict[str, Any]]:
            return [
                {
                    **row,
                    "input": number(row["input"]),
                    "output": number(row["output"]),
                    "children": None if row["children"] is None else numbered(row["children"]),
                }
                for row in rows
            ]

        waiting = [state["waiting"][key] for key in state["waiting"]]
        return {
            "run_id": self.plan["run_id"],
            "execution": self.plan["execution"],
            "pipeline": self.plan["pipeline"],
            "segment": state["segment"],
            "status": "RUNNING" if self.status is None else self.status.value,
            "values": values,
            "rows": numbered(state["rows"]),
            "final": state["value"],
            "committed": bool(state["committed"]),
            "tokens": self._tracker.total_tokens,
            "cost_usd": self._tracker.total_cost_usd,
            "failure": self._failure,
            "suspended": [one["reason"] for one in waiting] if self.status is RunStatus.SUSPENDED else [],
            "waiting": waiting,
            "failed_items": state["failed_items"],
            "unpriced": state["unpriced"],
            "hook_errors": state["hook_errors"],
            "broken": self._broken,
        }

    # ------------------------------------------------------------------ requests

    def _request(self, op: Operation, **more: Any) -> Request:
        state = self.state
        spent, prior = state["spent"], state["prior"]
        request: dict[str, Any] = {
            "op": op,
            "run_id": self.plan["run_id"],
            "execution": self.plan["execution"],
            "pipeline": self.plan["pipeline"],
            "settings": self.plan["settings"],
            "traceparent": state["traceparent"],
            "context": state["context"],
            "gone": state["gone"],
            "spent": {
                "tokens": spent["tokens"] + prior["tokens"],
                "cost_usd": spent["cost_usd"] + prior["cost_usd"],
                "latency_ms": spent["latency_ms"] + prior["latency_ms"],
            },
            "warned": state["warned"],
            "room": max(0, state["room"]),
            "value": state["value"],
            **more,
        }
        return request  # type: ignore[return-value]  # pyright: ignore[reportReturnType]

    def _of(self, place: _Place, op: Operation, value: Value, **more: Any) -> Request:
        return self._request(
            op,
            value=value,
            spec=place.spec,
            path=list(place.path),
            groups=list(place.groups),
            position=place.position,
            branch=place.branch,
            kind=place.kind,
            **more,
        )

    def _note(self, reply: Reply) -> None:
        """What every reply may say of the run as a whole."""
        state = self.state
        made, gone = reply.get("context") or ({}, [])
        state["context"] = {k: v for k, v in {**state["context"], **made}.items() if k not in gone}
        state["gone"] = [key for key in state["gone"] if key not in made] + list(gone)
        state["hook_errors"] += reply.get("hook_errors") or []
        state["warned"] += [one for one in reply.get("warned", []) if one not in state["warned"]]
        state["unpriced"] += [one for one in reply.get("unpriced", []) if one not in state["unpriced"]]
        if "broken" in reply:
            self._broken = reply["broken"]

    # ------------------------------------------------------------------ nodes

    async def _execute(self, place: _Place, value: Value) -> Value | _Stopped:
        if place.key in self.state["done"]:
            return self.state["done"][place.key]
        if place.spec["kind"] != "node":
            outcome = await self._group(place, value)
        else:
            outcome = await self._node(place, value)
        if place.branch and not isinstance(outcome, _Stopped) and place.kind != "item":
            self.state["done"][place.key] = outcome
        return outcome

    async def _node(self, place: _Place, value: Value) -> Value | _Stopped:
        attempt, repairs = 0, 0
        last: Failed | None = None
        after: float | None = None
        while True:
            attempt += 1
            request = self._of(
                place, "attempt", value, attempt=attempt, repairs=repairs, after=after, last=last,
                answer=self.state["answers"].get(place.key),
            )  # fmt: skip
            reply, cancelled = await self.driver.call(request)
            outcome = self._settle(place, value, reply)
            if reply.get("cancelled") or (cancelled and not isinstance(outcome, (dict, _Stopped))):
                raise asyncio.CancelledError
            if cancelled and isinstance(outcome, dict):
                self._keep(place, outcome)
                raise asyncio.CancelledError
            if outcome is not None:
                return outcome
            last = reply["failure"]
            again = self._decide(place.spec, last, attempt, bool(reply.get("repairing")), repairs)
            if isinstance(again, Stop):
                return _Stopped(last, spent=self._exceeded(place.spec["id"]) is not None)
            repairs += bool(reply.get("repairing"))
            after = again.delay_seconds
            await self.driver.sleep(after)

    def _keep(self, place: _Place, output: Value) -> None:
        """What was committed while the run was being cancelled is not run again by who goes on with it."""
        if place.branch:
            self.state["done"][place.key] = output
            return
        state = self.state
        state["committed"].append(output)
        state["value"], state["position"] = output, place.position + 1
        self._forget(place.position)

    def _settle(self, place: _Place, value: Value, reply: Reply) -> Value | _Stopped | None:
        """Take an attempt into the run: its row, what it spent, what it came to. None: ask whether another follows."""
        state = self.state
        self._note(reply)
        row = reply.get("row")
        output = reply.get("output")
        if row is not None:
            if row["input"] is not None or place.kind == "item":
                state["room"] -= size_of(row["input"] or value)
            row["input"] = row["input"] or value
            state["room"] -= size_of(output) + _ROW
            used = row["usage"]
            if used is not None:
                self._tracker.spend(used[0], used[2])
            if not place.branch:
                self._tracker.latency_ns += row["duration_ns"]
            tracker = self._tracker
            state["spent"] = {
                "tokens": tracker.total_tokens,
                "cost_usd": tracker.total_cost_usd,
                "latency_ms": tracker.latency_ns / 1e6,
            }
            place.rows.append(row)
        if "broken" in reply:
            if output is not None:
                self._keep(place, output)
            raise _Broken
        if reply.get("cancelled"):
            if output is not None:
                self._keep(place, output)
            raise asyncio.CancelledError
        if "waiting" in reply:
            state["waiting"][place.key] = reply["waiting"]
        if "halt" in reply:
            halt = reply["halt"]
            return _Stopped(reply["failure"], output, halt["partial"], halt["spent"], halt["suspended"])
        if "failure" in reply:
            return None
        assert output is not None
        exceeded = self._exceeded(place.spec["id"])
        if exceeded is None or row is None:
            return output
        # Siblings have spent it meanwhile, which the worker could not know.
        row["outcome"] = "failure"
        row["failure"] = [exceeded["failure_class"], exceeded["message"], exceeded["reason"]]
        return _Stopped({**exceeded, "attempt": row["attempt"]}, output, spent=True)

    def _exceeded(self, node_id: str) -> Failed | None:
        exceeded = self._tracker.exceeded(self._budget, node_id)
        if exceeded is None:
            return None
        return {
            "failure_class": FailureClass.RECOVERABLE.value,
            "message": str(exceeded),
            "reason": "budget",
            "retry_after": None,
            "node_id": node_id,
            "attempt": 1,
            "type": "BudgetExceeded",
            "data": [exceeded.dimension, exceeded.limit, exceeded.actual, exceeded.node_id],
        }

    def _decide(self, spec: NodeSpec, last: Failed, attempt: int, repairing: bool, repairs: int) -> Any:
        if self._exceeded(spec["id"]) is not None:
            return Stop("the budget is spent")
        return follow_up(
            failure_of(last),
            self._node_policies.get(spec["id"]),
            self._policies,
            attempt=attempt,
            group=spec["kind"] != "node",
            repairing=repairing,
            repairs=repairs,
            draw=self.driver.draw,
        )

    # ------------------------------------------------------------------ groups

    async def _group(self, place: _Place, value: Value) -> Value | _Stopped:
        progress = self.state["maps"].get(place.key)
        attempt = 0
        last: Failed | None = None
        after: float | None = None
        going = progress is not None and progress["opened_ns"] > 0
        if progress is not None and going:
            attempt = progress["attempt"] - 1  # After a fresh history, in the middle of it.
        while True:
            attempt += 1
            opened = 0
            if not going or progress is None:
                request = self._of(place, "open", value, attempt=attempt, after=after, last=last)
                reply, cancelled = await self.driver.call(request)
                if "halt" in reply:
                    halted = self._settle(place, value, reply)
                    assert isinstance(halted, _Stopped)
                    return halted
                self._note(reply)
                if "broken" in reply:
                    raise _Broken
                opened = reply["at_ns"]
            else:
                opened, cancelled = progress["opened_ns"], False
            going = False
            children = _Children(self, place, value, attempt, opened)
            broken = False
            if not cancelled:
                try:
                    await children.run()
                except asyncio.CancelledError:
                    cancelled = True
                except _Broken:
                    cancelled = broken = True
            try:
                outcome, failed = await self._close(place, value, attempt, opened, children, cancelled)
            except asyncio.CancelledError:
                if broken:
                    raise _Broken from None
                raise
            if outcome is not None:
                return outcome
            last = failed
            again = self._decide(place.spec, last, attempt, False, 0)
            if isinstance(again, Stop):
                return _Stopped(last, spent=self._exceeded(place.spec["id"]) is not None)
            after = again.delay_seconds
            await self.driver.sleep(after)

    async def _close(
        self, place: _Place, value: Value, attempt: int, opened: int, children: _Children, cancelled: bool
    ) -> tuple[Value | _Stopped | None, Failed]:
        stopped = children.stopped
        request = self._of(
            place, "close", value, attempt=attempt, opened_ns=opened, busy_ns=children.busy_ns(),
            outputs=children.in_order(), packs=children.packs(), failures=children.failures, cancelled=cancelled,
            stopped=None if stopped is None else {
                "failure": stopped.failure, "partial": stopped.partial, "spent": stopped.spent,
                "suspended": stopped.suspended,
            },
        )  # fmt: skip
        reply, late = await self.driver.call(request)
        row = reply.get("row")
        if row is not None:
            row["children"] = children.rows
            packs = children.new_packs()
            if packs:
                row["packs"] = packs
        outcome = self._settle(place, value, reply)
        if isinstance(outcome, dict):
            self.state["failed_items"] += len(children.failures)
            if late:
                self._keep(place, outcome)
        if late or cancelled:
            raise asyncio.CancelledError
        children.settled()
        return outcome, reply.get("failure") or _NO_FAILURE


_NO_FAILURE: Final[Failed] = {
    "failure_class": FailureClass.TERMINAL.value, "message": "", "reason": None, "retry_after": None, "node_id": "",
    "attempt": 0, "type": "", "data": None,
}  # fmt: skip


def _no_room(node_id: str) -> Failed:
    return {
        **_NO_FAILURE,
        "failure_class": FailureClass.RECOVERABLE.value,
        "message": f"the outputs of {node_id} are too large for the run itself; give the worker and the client a payload "
        "store (payloads=), then resume the run",
        "reason": "store",
        "node_id": node_id,
        "attempt": 1,
        "type": "StoreError",
    }


class _Children:
    """What runs inside a group in one attempt of it: the children of parallel(), or the items of a map."""

    def __init__(self, run: Interpreter, place: _Place, value: Value, attempt: int, opened: int) -> None:
        self._run = run
        self._place = place
        self._value = value
        self._each = place.spec["kind"] == "map"
        limit = place.spec["limit"]
        if self._each and limit is None:
            limit = FAN_OUT
        self._crew = Crew(limit)
        self.rows: list[Event] = []
        self.outputs: dict[int, Value] = {}
        self.failures: list[dict[str, Any]] = []
        self._stops: list[_Stopped] = []
        self._waits: list[_Stopped] = []
        self._map: _MapState | None = None
        if self._each:
            self._map = run.state["maps"].setdefault(
                place.key,
                {
                    "next": 0, "outputs": {}, "rows": [], "packs": [], "old_packs": [], "packed": [], "failures": [],
                    "busy": [], "attempt": attempt, "opened_ns": opened,
                },
            )  # fmt: skip
            if (
                self._map["opened_ns"] != opened
            ):  # A new attempt, or a new segment: what is not done is asked for again.
                self._map["next"] = 0
                self._map["busy"] = []
            self._map["attempt"], self._map["opened_ns"] = attempt, opened
            self.rows = self._map["rows"]
            self.failures = self._map["failures"]

    @property
    def stopped(self) -> _Stopped | None:
        return next(iter((*self._stops, *self._waits)), None)

    async def run(self) -> None:
        """Run them all. What stopped them is in ``stopped``. Raises Continue between two pages of a map at the top level."""
        if self._each:
            await self._items()
            return
        for index, spec in enumerate(self._place.spec["children"]):
            self._crew.start(self._one(index, spec, self._value, "node"))
        await self._crew.all()

    async def _one(self, index: int, spec: NodeSpec, value: Value, kind: str) -> None:
        if self._stops:
            return
        number = 0 if self._each else index
        place = self._place.child(index, spec, number, self.rows, kind)
        outcome = await self._run._execute(place, value)
        if not isinstance(outcome, _Stopped):
            self.outputs[index] = outcome
            if self._map is not None:
                self._map["outputs"][str(index)] = outcome
            return
        if outcome.suspended:  # Its siblings need not wait: all that can be done is done.
            self._waits.append(outcome)
            return
        if self._place.spec.get("collect") and not outcome.spent and not outcome.partial:
            failed = outcome.failure
            self.failures.append(
                {
                    "index": index, "node_id": failed["node_id"], "failure_class": failed["failure_class"],
                    "message": failed["message"], "reason": failed["reason"], "attempts": failed["attempt"],
                }
            )  # fmt: skip
            return
        self._stops.append(outcome)
        # A crossed limit cancels nobody: siblings in flight were paid for, they finish, and nothing new is called.
        if not self._stops[0].spent:
            self._crew.abort()

    # ------------------------------------------------------------------ items

    async def _items(self) -> None:
        run, place, progress = self._run, self._place, self._map
        assert progress is not None
        spec = place.spec["children"][0]
        done = set(progress["packed"]) | {int(index) for index in progress["outputs"]}
        done |= {failed["index"] for failed in self.failures}
        try:
            while True:
                first = progress["next"]
                request = run._of(
                    place, "items", self._value, attempt=progress["attempt"], first=first, count=PAGE
                )
                reply, cancelled = await run.driver.call(request)
                if cancelled:
                    raise asyncio.CancelledError
                if "failure" in reply:
                    self._stops.append(_Stopped(reply["failure"], partial="halt" in reply))
                    break
                for index, item in enumerate(reply["items"], first):
                    if index in done:
                        continue
                    await self._crew.room()
                    if self._stops:
                        break
                    self._crew.start(self._one(index, spec, item, "item"))
                if self._stops or first + PAGE >= reply["total"]:
                    break
                # The next page begins when this one has ended: what is under way is known by one number.
                await self._crew.all()
                if self._stops or self._waits:
                    break
                progress["next"] = first + PAGE
                full = not place.branch and run.driver.full()
                await self._pack(at_once=full or run.state["room"] < _RESERVE)
                if run.state["room"] < _RESERVE:
                    self._stops.append(_Stopped(_no_room(place.spec["id"]), partial=True))
                    break
                if full:
                    raise Continue
        except asyncio.CancelledError:
            self._crew.abort()
            raise
        finally:
            await self._crew.all()

    async def _pack(self, *, at_once: bool) -> None:
        """Put what is done out of the run's own state, if it is much."""
        run, progress = self._run, self._map
        assert progress is not None
        size = sum(size_of(value) for value in progress["outputs"].values()) + _ROW * len(progress["rows"])
        if size < _PACK and not at_once:
            return
        if not progress["outputs"] and not progress["rows"]:
            return
        indexes = [int(index) for index in progress["outputs"]]
        request = run._of(
            self._place,
            "pack",
            self._value,
            outputs=list(progress["outputs"].values()),
            rows=progress["rows"],
        )
        request["path"] = indexes
        reply, cancelled = await run.driver.call(request)
        if cancelled:
            raise asyncio.CancelledError
        if "failure" in reply:
            self._stops.append(_Stopped(reply["failure"], partial=True))
            return
        freed = size + sum(size_of(row["input"]) for row in progress["rows"])
        run.state["room"] += freed - size_of(reply["packed"])
        progress["busy"] = _merged(progress["busy"] + _spans(progress["rows"]))
        progress["packs"].append(reply["packed"])
        progress["packed"] += indexes
        progress["outputs"].clear()
        progress["rows"].clear()
        self.outputs.clear()

    def in_order(self) -> list[Value]:
        """The outputs that the group is closed with, but for those in packs."""
        if self._map is None:
            return [value for _, value in sorted(self.outputs.items())]
        return [value for _, value in sorted(self._map["outputs"].items(), key=lambda pair: int(pair[0]))]

    def packs(self) -> list[Value]:
        return [] if self._map is None else [*self._map["old_packs"], *self._map["packs"]]

    def new_packs(self) -> list[Value]:
        return [] if self._map is None else list(self._map["packs"])

    def busy_ns(self) -> int:
        """For how long any function inside ran."""
        spans = _spans(self.rows) + ([] if self._map is None else self._map["busy"])
        return sum(end - begin for begin, end in _merged(spans))

    def settled(self) -> None:
        """The group's row has the rows of this attempt; another one begins with none."""
        if self._map is not None:
            self._map["old_packs"] += self._map["packs"]
            self._map["rows"], self._map["packs"] = [], []
            self._map["opened_ns"] = 0


def _spans(rows: list[Event]) -> list[list[int]]:
    spans: list[list[int]] = []
    for row in rows:
        if row["children"]:
            spans += _spans(row["children"])
        else:
            spans.append([row["started_ns"], row["started_ns"] + row["duration_ns"]])
    return spans


def _merged(spans: list[list[int]]) -> list[list[int]]:
    """The same times without overlaps."""
    merged: list[list[int]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return merged
