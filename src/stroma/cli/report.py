"""How a run ended: in words, in JSON, and as an exit code."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pydantic import BaseModel

from stroma._utils.text import clean, count, money, plural, span
from stroma.checkpoint.protocols import Waiting
from stroma.cli.errors import Code, debugging
from stroma.cli.formatting import id_word
from stroma.cli.output import Part, emit, err
from stroma.cli.stores import Keeper
from stroma.cli.suspended import approve_hint, asked, open_ones, waiting_data, where
from stroma.cli.user_errors import last_frame
from stroma.contracts.schema import schema_of
from stroma.cost.budget import BudgetExceeded, ExecutionBudget, limits
from stroma.failures.classes import FailureClass
from stroma.failures.errors import SharedBudgetExceeded
from stroma.failures.failure import Failure, message_of, text_of
from stroma.trace.plain import jsonable
from stroma.trace.result import ExecutionResult, RunStatus

__all__ = ["Ending", "plain_state"]

_COMPLETE = (RunStatus.COMPLETED, RunStatus.RESUMED)


def plain_state(state: BaseModel | None) -> Any:
    """A state as JSON data, by field names."""
    return None if state is None else jsonable(schema_of(type(state)).raw(state))


@dataclass(frozen=True, slots=True)
class Ending:
    """One call of ``run()`` that is over.

    Attributes:
        stopped_by: the name of the signal that asked for the end, or None.
        seconds: wall time of the call.
        earlier_tokens, earlier_cost_usd: what earlier processes used on this execution.
        waiting: what nodes of a SUSPENDED run wait for.
        parent: the run that this one was forked from.
    """

    result: ExecutionResult
    pipeline: str
    target: str
    db: Keeper
    stopped_by: str | None
    seconds: float
    budget: ExecutionBudget
    earlier_tokens: int = 0
    earlier_cost_usd: float = 0.0
    waiting: list[Waiting] = field(default_factory=list)
    parent: str | None = None

    @property
    def complete(self) -> bool:
        return self.result.status in _COMPLETE

    @property
    def code(self) -> Code:
        """The exit code."""
        failure = self.result.failure
        if self.complete:
            return Code.OK
        if self.suspended:
            return Code.SUSPENDED
        if failure is None:
            return Code.OK if self.drained else Code.INTERRUPTED
        if self.over is not None:
            return Code.BUDGET
        return Code.ENVIRONMENT if failure.reason == "store" else Code.FAILED

    @property
    def suspended(self) -> bool:
        return self.result.status is RunStatus.SUSPENDED

    @property
    def drained(self) -> bool:
        """Whether the run ended as it was asked to, after a node."""
        return self.result.status is RunStatus.INTERRUPTED and self.stopped_by == "SIGTERM"

    @property
    def over(self) -> BudgetExceeded | None:
        """The limit that stopped the run, or keeps it from being tried again: a bigger one is needed to go on."""
        failure = self.result.failure
        if failure is None or self.suspended:
            return None
        if isinstance(failure.exception, BudgetExceeded):
            return failure.exception
        if failure.failure_class is FailureClass.TERMINAL:
            return None
        used = {
            "tokens": self.result.total_tokens + self.earlier_tokens,
            "cost": round(self.result.total_cost_usd + self.earlier_cost_usd, 9),
        }
        for dimension, limit in limits(self.budget):
            if used.get(dimension, 0) > limit:
                return BudgetExceeded(dimension, limit, used[dimension], failure.node_id)
        return None

    # ------------------------------------------------------------------ data

    def data(self) -> dict[str, Any]:
        """The object of ``--json``, schema "stroma.run/1"."""
        result, failure = self.result, self.result.failure
        wasted_tokens, wasted_cost = _wasted(result)
        return {
            "schema": "stroma.run/1",
            "run_id": result.run_id,
            "pipeline": self.pipeline,
            "status": result.status.value,
            "exit_code": int(self.code),
            "final_state": plain_state(result.final_state),
            "totals": {
                "tokens": result.total_tokens,
                "cost_usd": result.total_cost_usd,
                "wasted_tokens": wasted_tokens,
                "wasted_cost_usd": wasted_cost,
                "earlier_tokens": self.earlier_tokens,
                "earlier_cost_usd": self.earlier_cost_usd,
                "attempts": _attempts(result),
                "failed_items": result.failed_items,
                "seconds": round(self.seconds, 3),
            },
            "suspended": [waiting_data(one) for one in self.waiting],
            "parent": self.parent,
            "failure": None if failure is None or self.suspended else _failure_data(failure),
            "unpriced_models": result.unpriced_models,
            "hook_errors": len(result.hook_errors),
            "resume": None if self.complete or not self.db.keeps else self._resume(self.db.command),
        }

    # ------------------------------------------------------------------ words

    def tell(self, *, json: bool, quiet: bool) -> None:
        """The final state, or the object of ``--json``, to stdout; what happened and what to do to stderr."""
        if not self.complete:
            self._tell_stop()
        elif not quiet:
            self._tell_success()
        if json:
            emit(self.data())
        elif self.complete:
            emit(plain_state(self.result.final_state))

    def _tell_success(self) -> None:
        result = self.result
        err.line(("done", "bold green"), f": {result.status} in {span(self.seconds)}; {self._spent()}")
        self._tell_oddities()
        if self.db.keeps:
            err.line("look further: ", self.db.hint("show", id_word(result.run_id)))

    def _tell_stop(self) -> None:
        result, failure = self.result, self.result.failure
        if self.suspended:
            err.line(("suspended", "yellow"), f": run {clean(result.run_id)} waits for a person")
            self._tell_waiting()
        elif self.drained:
            err.line(
                ("stopped", "yellow"), f" by {self.stopped_by}: run {clean(result.run_id)} is {result.status}"
            )
        elif failure is None:
            why = "interrupted" if result.status is not RunStatus.CANCELLED else "cancelled from elsewhere"
            why = f"stopped by {self.stopped_by}" if self.stopped_by else why
            err.line(("stroma: ", "bold red"), f"{why}: run {clean(result.run_id)} is {result.status}")
        else:
            told = f"{failure.failure_class}{f' ({failure.reason})' if failure.reason else ''}"
            head: Part = ("stroma: ", "bold red")
            err.line(head, f"run {clean(result.run_id)} is {result.status}: {self._where(failure)}: {told}")
            err.line(f"  why: {clean(text_of(failure), 1000)}")
            for line in last_frame(failure.exception, of_any=False):
                err.line(f"  {line}")
            if self.over not in (None, failure.exception):
                err.line(f"  and: {self.over}")
            if debugging():
                err.write("".join(traceback.format_exception(failure.exception)))
        err.line(
            f"  spent: {self._spent()}; every finished node is kept"
            if self.db.keeps
            else f"  spent: {self._spent()}"
        )
        self._tell_oddities()
        err.line(f"  {self._mend()}")
        if failure is not None and self.db.keeps and not self.suspended:
            err.line(f"  look closer: {self.db.hint('show', id_word(result.run_id))}")

    def _tell_waiting(self) -> None:
        result, waiting = self.result, open_ones(self.waiting)
        for one in waiting:
            err.line(f"  {where(one)}: {clean(one.reason, 1000)}  (asks for {asked(one)})")
        for reason in result.suspended if not waiting else ():
            err.line(f"  {clean(reason, 1000)}")
        if self.db.keeps:
            for line in approve_hint(self.db, result.run_id, self.target, waiting):
                err.line(f"  answer: {line}")

    def _tell_oddities(self) -> None:
        result = self.result
        if result.unpriced_models:
            models = ", ".join(clean(model, 60) for model in result.unpriced_models)
            err.line(
                ("  note: ", "yellow"),
                f"no price is known for {models}: counted as $0; add it to KNOWN_MODELS",
            )
        if result.failed_items:
            err.line(
                ("  note: ", "yellow"),
                f"{plural(result.failed_items, 'item')} failed, the others went on",
                *self._again(),
            )
        if result.hook_errors:
            err.line(
                ("  note: ", "yellow"),
                f"{plural(len(result.hook_errors), 'hook call')} raised; nothing of the run changed",
            )

    def _again(self) -> list[str]:
        """How the items that failed are run again."""
        if not self.db.keeps:
            return []
        command = self.db.hint(
            "resume", id_word(self.result.run_id), self.target, options=("--retry-failed",)
        )
        return [f"; run them again: {command}"]

    def _spent(self) -> str:
        result = self.result
        wasted_tokens, wasted_cost = _wasted(result)
        parts = [f"{count(result.total_tokens)}, {money(result.total_cost_usd)}"]
        if wasted_tokens:
            parts.append(f"of it wasted on failed attempts {count(wasted_tokens)}, {money(wasted_cost)}")
        if self.earlier_tokens:
            parts.append(f"before that {count(self.earlier_tokens)}, {money(self.earlier_cost_usd)}")
        return "; ".join(parts)

    def _where(self, failure: Failure) -> str:
        """The node that failed and its position; of a group, the child whose failure became the group's."""
        failed = [event for event in self.result.trace if event.failure is not None]
        if not failed or failed[-1].node_id != failure.node_id:
            return f"node {clean(failure.node_id, 100)!r}"
        event = failed[-1]
        groups: list[str] = []
        while children := [c for c in event.children if c.failure_message == failure.message]:
            groups.insert(0, f" in {clean(event.node_id, 100)}")
            # The first that stopped took its siblings with it; its last attempt is the one that counts.
            event = [child for child in children if child.branch == children[0].branch][-1]
        at = f"{event.position}.{event.branch}" if event.branch else str(event.position)
        attempt = f", attempt {event.attempt}" if event.attempt > 1 else ""
        return f"node {clean(event.node_id, 100)!r} (at {at}{attempt}){''.join(groups)}"

    # ------------------------------------------------------------------ the way on

    def _mend(self) -> str:
        failure = self.result.failure
        if not self.db.keeps:
            return f"{self.db.name} keeps nothing to go on with; give a file next time: --db FILE"
        words, over = "it may work later; go on with", self.over
        if self.suspended:
            words = "then go on with"
        elif failure is None:
            words = "go on with"
        elif isinstance(over, SharedBudgetExceeded):
            words = "once the shared budget has room, go on with"
        elif over is not None:
            words = "go on with more"
            if over.dimension == "latency":
                words = "raise max_latency_ms in the pipeline's budget, then go on with"
        elif failure.reason == "store":
            words = "mend what the store says, then go on with"
        elif failure.failure_class is FailureClass.TERMINAL:
            words = "trying again will not help: mend the cause, then go on with"
        elif failure.retry_after_seconds is not None:
            when = datetime.fromtimestamp(time.time() + failure.retry_after_seconds).strftime("%H:%M:%S")
            words = f"the server asks to come back at {when}; then go on with"
        return f"{words}: {self._resume(self.db.hint)}"

    def _resume(self, command: Callable[..., str]) -> str:
        """The command that goes on with this run, under a budget that lets it."""
        options: tuple[str, ...] = ()
        over = self.over
        if over is not None and not isinstance(
            over, SharedBudgetExceeded
        ):  # The run's own limits are others.
            room = max(2 * over.limit, 1.5 * over.actual) or 1.0
            if over.dimension == "tokens":
                options = ("--budget-tokens", f"{room:.0f}")
            elif over.dimension == "cost":
                options = ("--budget-usd", f"{room:.6g}")
        return command("resume", id_word(self.result.run_id), self.target, options=options)


def _wasted(result: ExecutionResult) -> tuple[int, float]:
    """Tokens and dollars of attempts that committed nothing. A group uses none of its own."""
    tokens, cost = 0, 0.0
    for event in result.trace.walk():
        if event.output_state is None:
            tokens, cost = tokens + event.usage.tokens, cost + event.usage.cost_usd
        if event.left_out is not None:
            tokens, cost = tokens + event.left_out.lost_tokens, cost + event.left_out.lost_cost_usd
    return tokens, cost


def _attempts(result: ExecutionResult) -> int:
    """How many there were, those that were too many to be kept among them."""
    events = result.trace.walk()
    return sum(1 + (0 if event.left_out is None else event.left_out.events) for event in events)


def _failure_data(failure: Failure) -> dict[str, Any]:
    return {
        "node_id": failure.node_id,
        "attempt": failure.attempt,
        "class": failure.failure_class.value,
        "reason": failure.reason,
        "exception": type(failure.exception).__name__,
        "message": message_of(failure.exception),
        "retry_after_seconds": failure.retry_after_seconds,
    }
