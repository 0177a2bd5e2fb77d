"""Moves a run through its plan. Deterministic: all of its input comes through its driver.

So it may run where code is replayed (a Temporal workflow), and it can be given its state back at any of its safe points.
"""

# Which keys a request or a reply has depends on what it is for.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from stroma.cost.budget import ExecutionBudget
from stroma.drivers.remote.children import Children, busy_ns
from stroma.drivers.remote.effect_calls import call_effect
from stroma.drivers.remote.failure_data import decode_failure, encode_failure
from stroma.drivers.remote.flow_bodies import FlowBodies, run_body
from stroma.drivers.remote.plans import policies_of
from stroma.drivers.remote.questions import answers_for, record_question
from stroma.drivers.remote.state import (
    NO_FAILURE,
    Broken,
    Continue,
    Driver,
    NodePlace,
    RunState,
    StoppedExecution,
    charge_row,
    forget_position,
    new_state,
    next_segment,
    number_states,
    shortened,
    total_spent,
    tracker_of,
)
from stroma.drivers.remote.wire import (
    ActivityRequest,
    FailureData,
    NodeSpec,
    Operation,
    Plan,
    Reply,
    SegmentReport,
    Value,
    fit_context,
    json_size,
)
from stroma.failures.classes import FailureClass
from stroma.failures.failure import Failure
from stroma.failures.policy import Retry, Stop, follow_up
from stroma.trace.result import RunStatus

__all__ = ["Continue", "Driver", "Interpreter", "RunState", "new_state", "next_segment"]


class Interpreter:
    """One run. ``state`` is always as far as the run is; between two awaits of the driver it is whole."""

    def __init__(self, plan: Plan, state: RunState, driver: Driver, bodies: FlowBodies | None = None) -> None:
        self.plan = plan
        self.state = state
        state.setdefault("effects", {})  # Old histories have none.
        self.driver = driver
        self._policies = policies_of(plan["policies"])
        self._node_policies = {
            node: policies_of(policies) for node, policies in plan["node_policies"].items()
        }
        self._budget = ExecutionBudget(**(plan["settings"].get("budget") or {}))
        self.tracker = tracker_of(state)
        #: The status at the end of this segment; None before.
        self.status: RunStatus | None = None
        self._failure: FailureData | None = None
        self._broken: list[str] | None = None
        #: The groups that are running, by position.
        self._open: dict[int, list[Children]] = {}
        self._bodies = bodies
        #: Makes a running flow look at the answers that have come.
        self.wake_flow: Callable[[], None] | None = None
        #: When a suspended flow is to go on without an answer, in ms since the epoch.
        self.wake_ms: int | None = None

    # ------------------------------------------------------------------ a segment

    async def run(self) -> SegmentReport:
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
        except Broken:
            status = RunStatus.INTERRUPTED
        self.status = status
        try:
            reply, late = await self.driver.ask(
                self._request("end", value=state["initial"], report=self.report())
            )
            self._note(reply)
            cancelled |= late
        except asyncio.CancelledError:
            cancelled = True  # It has ended; only the hooks may not know.
        except Broken:
            pass
        if cancelled and self.status is RunStatus.SUSPENDED:
            self.status = RunStatus.CANCELLED  # Nobody is to wait for an answer any more.
        return self.report()

    async def _begin(self) -> None:
        state, nodes = self.state, self.plan["nodes"]
        skipped: list[dict[str, Any]] = [
            {"spec": nodes[position], "value": value, "position": position, "branch": ""}
            for position, value in enumerate(state["committed"])
        ]
        for key, (node_id, kind, *_) in state["flow"]["steps"].items() if "flow" in state else ():
            if key in state["done"]:
                spec = {"id": node_id, "kind": kind}
                place = {"position": state["position"], "branch": key.partition("|")[2]}
                skipped.append({"spec": spec, "value": state["done"][key], **place})
        reply, cancelled = await self.driver.ask(
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
            place = NodePlace(nodes[position], (position,), position, "", (), state["rows"])
            outcome = await self.execute(place, state["value"])
            output = outcome.output if isinstance(outcome, StoppedExecution) else outcome
            if output is not None:
                state["committed"].append(output)
                state["value"] = output
                state["position"] = position + 1
                forget_position(state, position)
            if isinstance(outcome, StoppedExecution):
                return self._stopped_as(outcome)
            if self.driver.full() and state["position"] < len(nodes):
                raise Continue
        return RunStatus.RESUMED if state["continued"] else RunStatus.COMPLETED

    def _stopped_as(self, outcome: StoppedExecution) -> RunStatus:
        if outcome.suspended:
            return RunStatus.SUSPENDED
        self._failure = outcome.failure
        terminal = outcome.failure["failure_class"] == FailureClass.TERMINAL and not outcome.partial
        return RunStatus.FAILED if terminal else RunStatus.PARTIAL

    def report(self) -> SegmentReport:
        """Return the report of this segment of the run so far."""
        state = self.state
        rows, values = number_states(state["rows"])
        waiting = [state["waiting"][key] for key in state["waiting"]]
        return {
            "run_id": self.plan["run_id"],
            "execution": self.plan["execution"],
            "pipeline": self.plan["pipeline"],
            "segment": state["segment"],
            "status": "RUNNING" if self.status is None else self.status.value,
            "values": values,
            "rows": rows,
            "final": state["value"],
            "committed": bool(state["committed"]),
            "tokens": self.tracker.total_tokens,
            "cost_usd": self.tracker.total_cost_usd,
            "failure": self._failure,
            "suspended": [one["reason"] for one in waiting] if self.status is RunStatus.SUSPENDED else [],
            "waiting": waiting,
            "failed_items": state["failed_items"],
            "unpriced": state["unpriced"],
            "hook_errors": state["hook_errors"],
            "broken": self._broken,
        }

    # ------------------------------------------------------------------ requests

    def _request(self, op: Operation, **more: Any) -> ActivityRequest:
        state = self.state
        request: dict[str, Any] = {
            "op": op,
            "run_id": self.plan["run_id"],
            "execution": self.plan["execution"],
            "pipeline": self.plan["pipeline"],
            "settings": self.plan["settings"],
            "traceparent": state["traceparent"],
            "context": state["context"],
            "gone": state["gone"],
            "spent": total_spent(state),
            "warned": state["warned"],
            "room": max(0, state["room"]),
            "value": state["value"],
            **more,
        }
        return request  # type: ignore[return-value]  # pyright: ignore[reportReturnType]

    def of(self, place: NodePlace, op: Operation, value: Value, **more: Any) -> ActivityRequest:
        return self._request(
            op,
            value=value,
            spec=place.spec,
            path=list(place.path),
            groups=list(place.groups),
            position=place.position,
            branch=place.branch,
            kind=place.kind,
            **{"traceparent": place.traceparent or self.state["traceparent"], **self._busy(place), **more},
        )

    def _busy(self, place: NodePlace) -> dict[str, Any]:
        """Return how much of a time limit a run has used in the current group."""
        if not place.groups or self._budget.max_latency_ms is None:
            return {}
        return {"busy_ns": busy_ns(self._open.get(place.position, []))}

    def _note(self, reply: Reply) -> None:
        """Apply the parts of a reply that concern the run as a whole."""
        state = self.state
        changes, gone = reply.get("context") or ({}, [])
        remaining = {key: value for key, value in state["context"].items() if key not in gone}
        changes = fit_context(remaining, changes)  # Nodes that ran at once may have filled it together.
        state["context"] = {**remaining, **changes}
        state["gone"] = [key for key in state["gone"] if key not in changes] + list(gone)
        for hook, node_id, name, message in reply.get("hook_errors") or []:
            text = shortened(message, state["room"])
            state["room"] -= json_size(text)
            state["hook_errors"].append([hook, node_id, name, text])
        state["warned"] += [one for one in reply.get("warned", []) if one not in state["warned"]]
        state["unpriced"] += [one for one in reply.get("unpriced", []) if one not in state["unpriced"]]
        if "broken" in reply:
            self._broken = reply["broken"]

    # ------------------------------------------------------------------ nodes

    async def execute(self, place: NodePlace, value: Value) -> Value | StoppedExecution:
        if place.key in self.state["done"]:
            return self.state["done"][place.key]
        if place.spec["kind"] == "flow":
            if self._bodies is None:
                raise TypeError(f"this driver runs no flows, got {place.spec['id']!r}")
            return await run_body(self, self._bodies, place, value)
        if place.spec["kind"] != "node":
            outcome = await self._group(place, value)
        else:
            outcome = await self._node(place, value)
        # An output that took the run over its budget is committed as well.
        output = outcome.output if isinstance(outcome, StoppedExecution) else outcome
        if place.branch and output is not None and place.kind != "item":
            self.state["done"][place.key] = output
        return outcome

    async def _node(self, place: NodePlace, value: Value) -> Value | StoppedExecution:
        attempt, repairs = 0, 0
        last: FailureData | None = None
        after: float | None = None
        while True:
            attempt += 1
            request = self.of(
                place, "attempt", value, attempt=attempt, repairs=repairs, after=after, last=last,
                **answers_for(self.state, place),
            )  # fmt: skip
            if place.spec.get("effect"):
                reply, cancelled = await call_effect(self.driver, self.state, place, request)
            else:
                reply, cancelled = await self.driver.ask(request)
            outcome = self._settle(place, value, reply)
            if reply.get("cancelled") or (cancelled and not isinstance(outcome, (dict, StoppedExecution))):
                raise asyncio.CancelledError
            if cancelled and isinstance(outcome, dict):
                self._keep(place, outcome)
                raise asyncio.CancelledError
            if outcome is not None:
                return outcome
            last = reply["failure"]
            again = self._decide(place.spec, last, attempt, bool(reply.get("repairing")), repairs)
            if isinstance(again, Stop):
                return StoppedExecution(last, spent=self._exceeded(place.spec["id"]) is not None)
            repairs += bool(reply.get("repairing"))
            after = again.delay_seconds
            await self.driver.sleep(after)

    def _keep(self, place: NodePlace, output: Value) -> None:
        """Record an output that was committed during a cancellation, so that a resume does not run it again."""
        if place.branch:
            self.state["done"][place.key] = output
            return
        state = self.state
        state["committed"].append(output)
        state["value"], state["position"] = output, place.position + 1
        forget_position(self.state, place.position)

    def _settle(self, place: NodePlace, value: Value, reply: Reply) -> Value | StoppedExecution | None:
        """Take an attempt into the run: its row, what it spent, what it came to. None: ask whether another follows."""
        state = self.state
        self._note(reply)
        row = reply.get("row")
        output = reply.get("output")
        if row is not None:
            charge_row(state, self.tracker, place, value, reply)
            place.rows.append(row)
        if "broken" in reply:
            if output is not None:
                self._keep(place, output)
            raise Broken
        if reply.get("cancelled"):
            if output is not None:
                self._keep(place, output)
            raise asyncio.CancelledError
        if "waiting" in reply:
            record_question(state, reply["waiting"])
        if "halt" in reply:
            halt = reply["halt"]
            return StoppedExecution(
                reply["failure"], output, halt["partial"], halt["spent"], halt["suspended"]
            )
        if "failure" in reply:
            return None
        assert output is not None
        exceeded = self._exceeded(place.spec["id"])
        if exceeded is None or row is None:
            return output
        # Siblings have spent it meanwhile, which the worker could not know.
        row["outcome"] = "failure"
        row["failure"] = [
            exceeded["failure_class"],
            exceeded["message"],
            exceeded["reason"],
            exceeded["type"],
        ]
        return StoppedExecution({**exceeded, "attempt": row["attempt"]}, output, spent=True)

    def _exceeded(self, node_id: str) -> FailureData | None:
        exceeded = self.tracker.exceeded(self._budget, node_id)
        if exceeded is None:
            return None
        return encode_failure(
            Failure(exceeded, FailureClass.RECOVERABLE, node_id, 1, str(exceeded), "budget")
        )

    def _decide(
        self, spec: NodeSpec, last: FailureData, attempt: int, repairing: bool, repairs: int
    ) -> Retry | Stop:
        if self._exceeded(spec["id"]) is not None:
            return Stop("the budget is spent")
        return follow_up(
            decode_failure(last),
            self._node_policies.get(spec["id"]),
            self._policies,
            attempt=attempt,
            group=spec["kind"] != "node",
            repairing=repairing,
            repairs=repairs,
            draw=self.driver.draw,
        )

    # ------------------------------------------------------------------ groups

    async def _group(self, place: NodePlace, value: Value) -> Value | StoppedExecution:
        progress = self.state["maps"].get(place.key)
        attempt = 0
        last: FailureData | None = None
        after: float | None = None
        going = progress is not None and progress["opened_ns"] > 0
        if progress is not None and going:
            attempt = progress["attempt"] - 1  # After a fresh history, in the middle of it.
        while True:
            attempt += 1
            if not going or progress is None:
                request = self.of(place, "open", value, attempt=attempt, after=after, last=last)
                reply, cancelled = await self.driver.ask(request)
                if "halt" in reply:
                    halted = self._settle(place, value, reply)
                    assert isinstance(halted, StoppedExecution)
                    return halted
                self._note(reply)
                if "broken" in reply:
                    raise Broken
                opened, span = reply["at_ns"], reply.get("traceparent")
            else:
                opened, span, cancelled = progress["opened_ns"], progress["traceparent"], False
            going = broken = False
            children = Children(self, place, value, attempt, opened, span or place.traceparent)
            around = self._open.setdefault(place.position, [])
            if not cancelled:
                around.append(children)
                try:
                    await children.run()
                except asyncio.CancelledError:
                    cancelled = True
                except Broken:
                    cancelled = broken = True
                finally:
                    around.remove(children)
            try:
                outcome, last = await self._close(place, value, attempt, opened, children, cancelled)
            except asyncio.CancelledError:
                if broken:
                    raise Broken from None
                raise
            if outcome is not None:
                return outcome
            again = self._decide(place.spec, last, attempt, False, 0)
            if isinstance(again, Stop):
                return StoppedExecution(last, spent=self._exceeded(place.spec["id"]) is not None)
            after = again.delay_seconds
            await self.driver.sleep(after)

    async def _close(
        self, place: NodePlace, value: Value, attempt: int, opened: int, children: Children, cancelled: bool
    ) -> tuple[Value | StoppedExecution | None, FailureData]:
        stopped = children.stopped
        request = self.of(
            place, "close", value, attempt=attempt, traceparent=children.traceparent or self.state["traceparent"], opened_ns=opened, busy_ns=children.busy_ns(), span_ns=children.span_ns(),
            indexes=children.in_order()[0], outputs=children.in_order()[1], packs=children.packs(), failures=children.failures, cancelled=cancelled,
            stopped=None if stopped is None else {
                "failure": stopped.failure, "partial": stopped.partial, "spent": stopped.spent,
                "suspended": stopped.suspended,
            },
        )  # fmt: skip
        reply, late = await self.driver.ask(request)
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
        return outcome, reply.get("failure") or NO_FAILURE
