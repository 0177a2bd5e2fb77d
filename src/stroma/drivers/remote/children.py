"""Children of a group: the nodes of parallel() or of a sequence, or the items of a map, with bounded concurrency."""

# Which keys a request or a reply has depends on what it is for.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
from typing import Any, Final, Protocol

from stroma.drivers.remote.state import (
    NO_FAILURE,
    ROW,
    Continue,
    Driver,
    MapState,
    NodePlace,
    RunState,
    StoppedExecution,
    row_size,
)
from stroma.drivers.remote.task_pool import OrderedTaskPool
from stroma.drivers.remote.wire import (
    ActivityRequest,
    Event,
    FailureData,
    NodeSpec,
    Operation,
    Value,
    json_size,
    size_of,
)
from stroma.failures.classes import FailureClass

__all__ = ["Children", "busy_ns", "merged", "spans_of"]

#: Items of a map whose states are requested at once, and that run at once without a limit.
PAGE: Final = 200
FAN_OUT: Final = 64
#: Bytes of rows and outputs of items from which they are packed together.
_PACK: Final = 128 * 1024
_RESERVE: Final = 192 * 1024  # of the run's room, for the page of items that is under way


def _no_room(node_id: str) -> FailureData:
    return {
        **NO_FAILURE,
        "failure_class": FailureClass.RECOVERABLE.value,
        "message": f"the outputs of {node_id} are too large for the run itself; pass a payload store to the worker and "
        "the client (payloads=), then resume the run",
        "reason": "store",
        "node_id": node_id,
        "attempt": 1,
        "type": "StoreError",
    }


class Parent(Protocol):
    """The parts of a run that the children of its groups use."""

    state: RunState
    driver: Driver

    def of(self, place: NodePlace, op: Operation, value: Value, **more: Any) -> ActivityRequest: ...
    async def execute(self, place: NodePlace, value: Value) -> Value | StoppedExecution: ...


class Children:
    """The children of one attempt of a group: the nodes of parallel() or of a sequence, or the items of a map."""

    def __init__(
        self, run: Parent, place: NodePlace, value: Value, attempt: int, opened: int, traceparent: str | None
    ) -> None:
        self.traceparent = traceparent
        self._run = run
        self._place = place
        self._value = value
        self._each = place.spec["kind"] == "map"
        limit = place.spec["limit"]
        if self._each and limit is None:
            limit = FAN_OUT
        self._pool = OrderedTaskPool(limit)
        self.rows: list[Event] = []
        self.outputs: dict[int, Value] = {}
        self.failures: list[dict[str, Any]] = []
        self._stops: list[StoppedExecution] = []
        self._waits: list[StoppedExecution] = []
        self._map: MapState | None = None
        if self._each:
            self._map = run.state["maps"].setdefault(
                place.key,
                {
                    "next": 0, "outputs": {}, "rows": [], "packs": [], "old_packs": [], "packed": [], "failures": [],
                    "busy": [], "attempt": attempt, "opened_ns": opened,
                    "traceparent": traceparent,
                },
            )  # fmt: skip
            if (
                self._map["opened_ns"] != opened
            ):  # A new attempt, or a new segment: unfinished items are requested again.
                self._map["next"] = 0
                self._map["busy"] = []
            self._map["attempt"], self._map["opened_ns"], self._map["traceparent"] = (
                attempt,
                opened,
                traceparent,
            )
            self.rows = self._map["rows"]
            self.failures = self._map["failures"]

    @property
    def stopped(self) -> StoppedExecution | None:
        return next(iter((*self._stops, *self._waits)), None)

    async def run(self) -> None:
        """Run all children; ``stopped`` tells what stopped them. Raises Continue between two pages of a top-level map."""
        if self._each:
            await self._items()
            return
        if self._place.spec["kind"] == "sequence":
            await self._in_turn()
            return
        for index, spec in enumerate(self._place.spec["children"]):
            self._pool.start(self._one(index, spec, self._value, "node"))
        await self._pool.join()

    async def _in_turn(self) -> None:
        value = self._value
        for index, spec in enumerate(self._place.spec["children"]):
            await self._one(index, spec, value, "node")
            if index not in self.outputs:
                return
            value = self.outputs[index]
            self.outputs = {index: value}  # The last one is the output of the group.

    async def _one(self, index: int, spec: NodeSpec, value: Value, kind: str) -> None:
        if self._stops:
            return
        number = 0 if self._each else index
        place = self._place.child(index, spec, number, self.rows, kind, self.traceparent)
        outcome = await self._run.execute(place, value)
        if not isinstance(outcome, StoppedExecution):
            self.outputs[index] = outcome
            self._commit_item(index, place, outcome)
            return
        if outcome.suspended:  # Its siblings go on, so that only the suspended nodes remain to be run.
            self._waits.append(outcome)
            return
        if self._place.spec.get("collect") and not outcome.spent and not outcome.partial:
            failed = outcome.failure
            node_id, attempts = failed.get("inner") or (failed["node_id"], failed["attempt"])
            self._run.state["room"] -= ROW + json_size(failed["message"])
            self.failures.append(
                {
                    "index": index, "node_id": node_id, "failure_class": failed["failure_class"],
                    "message": failed["message"], "reason": failed["reason"], "attempts": attempts,
                }
            )  # fmt: skip
            self._forget_inside(place)
            return
        self._stops.append(outcome)
        if outcome.output is not None:
            self._commit_item(index, place, outcome.output)
        # A crossed limit cancels nobody: siblings in flight were paid for, they finish, and nothing new is called.
        if not self._stops[0].spent:
            self._pool.abort()

    # ------------------------------------------------------------------ items

    def _commit_item(self, index: int, place: NodePlace, output: Value) -> None:
        """Record the output of an item, also of one that took the run over its budget."""
        if self._map is not None:
            self._map["outputs"][str(index)] = output
            self._forget_inside(place)

    def _forget_inside(self, place: NodePlace) -> None:
        """Delete what the run holds of the nodes of an item that has ended: a map may have any number of items."""
        if place.spec["kind"] != "sequence":  # Histories of earlier releases have the rest.
            return
        state = self._run.state
        for inside in (state["done"], state["maps"], state["effects"]):
            for key in [key for key in inside if key.startswith(f"{place.key}.")]:
                del inside[key]

    async def _items(self) -> None:
        run, place, progress = self._run, self._place, self._map
        assert progress is not None
        spec = place.spec["children"][0]
        done = set(progress["packed"]) | {int(index) for index in progress["outputs"]}
        done |= {failed["index"] for failed in self.failures}
        try:
            while True:
                first = progress["next"]
                request = run.of(
                    place, "items", self._value, attempt=progress["attempt"], first=first, count=PAGE
                )
                reply, cancelled = await run.driver.ask(request)
                if cancelled:
                    raise asyncio.CancelledError
                if "failure" in reply:
                    self._stops.append(StoppedExecution(reply["failure"], partial="halt" in reply))
                    break
                for index, item in enumerate(reply["items"], first):
                    if index in done:
                        continue
                    await self._pool.wait_for_room()
                    if self._stops:
                        break
                    self._pool.start(self._one(index, spec, item, "item"))
                if self._stops or first + PAGE >= reply["total"]:
                    break
                # The next page begins when this one has ended: what is under way is known by one number.
                await self._pool.join()
                if self._stops or self._waits:
                    break
                progress["next"] = first + PAGE
                full = not place.branch and run.driver.full()
                await self._pack(at_once=full or run.state["room"] < _RESERVE)
                if run.state["room"] < _RESERVE:
                    self._stops.append(StoppedExecution(_no_room(place.spec["id"]), partial=True))
                    break
                if full:
                    raise Continue
        except asyncio.CancelledError:
            self._pool.abort()
            raise
        finally:
            await self._pool.join()

    async def _pack(self, *, at_once: bool) -> None:
        """Put what is done out of the run's own state, if it is much."""
        run, progress = self._run, self._map
        assert progress is not None
        size = sum(size_of(value) for value in progress["outputs"].values()) + sum(
            map(row_size, progress["rows"])
        )
        if self._place.spec["children"][0]["kind"] == "sequence":
            size += _room_inside(progress["rows"])
        if size < _PACK and not at_once:
            return
        if not progress["outputs"] and not progress["rows"]:
            return
        indexes = [int(index) for index in progress["outputs"]]
        request = run.of(
            self._place,
            "pack",
            self._value,
            outputs=list(progress["outputs"].values()),
            rows=progress["rows"],
        )
        request["indexes"] = indexes
        reply, cancelled = await run.driver.ask(request)
        if cancelled:
            raise asyncio.CancelledError
        if "failure" in reply:
            self._stops.append(StoppedExecution(reply["failure"], partial=True))
            return
        freed = size + sum(size_of(row["input"]) for row in progress["rows"])
        run.state["room"] += freed - size_of(reply["packed"])
        progress["busy"] = merged(progress["busy"] + spans_of(progress["rows"]))
        progress["packs"].append(reply["packed"])
        progress["packed"] += indexes
        progress["outputs"].clear()
        progress["rows"].clear()
        self.outputs.clear()

    def in_order(self) -> tuple[list[int], list[Value]]:
        """Return the outputs of the group and their numbers, without those in packs."""
        outputs = self.outputs if self._map is None else {int(i): v for i, v in self._map["outputs"].items()}
        return sorted(outputs), [value for _, value in sorted(outputs.items())]

    def packs(self) -> list[Value]:
        return [] if self._map is None else [*self._map["old_packs"], *self._map["packs"]]

    def new_packs(self) -> list[Value]:
        return [] if self._map is None else list(self._map["packs"])

    def busy_ns(self) -> int:
        """For how long any function inside ran."""
        return busy_ns([self])

    def span_ns(self) -> list[int]:
        """Return the start of the first function inside and the end of the last one; [] if none ran."""
        spans = self.spans()
        return [min(span[0] for span in spans), max(span[1] for span in spans)] if spans else []

    def spans(self) -> list[list[int]]:
        return spans_of(self.rows) + ([] if self._map is None else self._map["busy"])

    def settled(self) -> None:
        """Move the rows of this attempt into the group's row."""
        if self._map is not None:
            self._map["old_packs"] += self._map["packs"]
            self._map["rows"], self._map["packs"] = [], []
            self._map["opened_ns"] = 0


def _room_inside(rows: list[Event]) -> int:
    """Return the bytes that the rows inside these took of the run's room."""
    inside = [child for row in rows for child in row["children"] or ()]
    packs = [pack for child in inside for pack in child.get("packs", ())]
    return (
        sum(child["charged"] for child in inside)
        + sum(map(size_of, packs))
        + (_room_inside(inside) if inside else 0)
    )


def busy_ns(groups: list[Children]) -> int:
    """For how long any function inside any of these ran."""
    return sum(end - begin for begin, end in merged([span for one in groups for span in one.spans()]))


def spans_of(rows: list[Event]) -> list[list[int]]:
    """Return when the functions of rows ran: begin and end in nanoseconds since the epoch."""
    spans: list[list[int]] = []
    for row in rows:
        if row["children"]:
            spans += spans_of(row["children"])
        else:
            spans.append([row["started_ns"], row["started_ns"] + row["duration_ns"]])
    return spans


def merged(spans: list[list[int]]) -> list[list[int]]:
    """Return the intervals without overlaps."""
    intervals: list[list[int]] = []
    for begin, end in sorted(spans):
        if intervals and begin <= intervals[-1][1]:
            intervals[-1][1] = max(intervals[-1][1], end)
        else:
            intervals.append([begin, end])
    return intervals
