"""Report of a finished run: text, JSON and exit code."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from stroma._utils.access import kind_of
from stroma._utils.secrets import Secrets
from stroma._utils.text import clean, format_amount, format_duration, format_usage, pluralize
from stroma.checkpoint.entries import Waiting
from stroma.checkpoint.history.facts import answer_type, node_text, resume_options, unanswered
from stroma.checkpoint.records import describe_wait
from stroma.cli.errors import Code, is_debugging, last_frame
from stroma.cli.formatting import id_word, localize
from stroma.cli.output import Part, emit, err
from stroma.cli.stores import Database
from stroma.cli.suspended import resume_advice, waiting_data, waiting_hints
from stroma.contracts.schema import schema_of
from stroma.cost.budget import BudgetExceeded, ExecutionBudget, limits
from stroma.cost.usage import NO_MODEL
from stroma.failures.classes import FailureClass, describe_class
from stroma.failures.errors import SharedBudgetExceeded
from stroma.failures.failure import Failure
from stroma.trace.events import place_text
from stroma.trace.outline import shown_place
from stroma.trace.plain import jsonable
from stroma.trace.result import ExecutionResult, RunStatus, Total


def plain_state(state: BaseModel | None) -> Any:
    """Return a state as JSON data with field names."""
    return None if state is None else jsonable(schema_of(type(state)).raw(state))


@dataclass(frozen=True, slots=True)
class RunReport:
    """Report of one finished run.

    Attributes:
        stopped_by: name of the signal that stopped the run, or None.
        seconds: wall time of the run, without the flush of exporters.
        waiting: pending questions of a SUSPENDED run.
        parent: id of the run that this one was forked from.
    """

    result: ExecutionResult
    pipeline: str
    target: str
    db: Database
    stopped_by: str | None
    seconds: float
    budget: ExecutionBudget
    waiting: list[Waiting] = field(default_factory=list)
    parent: str | None = None

    @property
    def is_complete(self) -> bool:
        return self.result.ok

    @property
    def code(self) -> Code:
        """Exit code of the command."""
        failure = self.result.failure
        if self.is_complete:
            return Code.OK
        if self.is_suspended:
            return Code.SUSPENDED
        if failure is None:
            return Code.OK if self.is_drained else Code.INTERRUPTED
        if self.exceeded is not None:
            return Code.BUDGET
        return Code.ENVIRONMENT if failure.reason == "store" else Code.FAILED

    @property
    def is_suspended(self) -> bool:
        return self.result.status is RunStatus.SUSPENDED

    @property
    def is_drained(self) -> bool:
        """Return True if SIGTERM ended the run after the node in flight."""
        return self.result.status is RunStatus.INTERRUPTED and self.stopped_by == "SIGTERM"

    @property
    def exceeded(self) -> BudgetExceeded | None:
        """Exceeded limit that must be raised before the run can continue; None if there is none."""
        failure = self.result.failure
        if failure is None or self.is_suspended:
            return None
        if isinstance(failure.exception, BudgetExceeded):
            return failure.exception
        if failure.failure_class is FailureClass.TERMINAL:
            return None
        used = {"tokens": self.result.total.tokens, "cost": self.result.total.cost_usd}
        for dimension, limit in limits(self.budget):
            if used.get(dimension, 0) > limit:
                return BudgetExceeded(dimension, limit, used[dimension], failure.node_id)
        return None

    # ------------------------------------------------------------------ data

    def data(self) -> dict[str, Any]:
        """Return the object of ``--json``, schema "stroma.run/1"."""
        result, failure = self.result, self.result.failure
        wasted_tokens, wasted_cost = _wasted_usage(result)
        earlier = _earlier_usage(result)
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
                "earlier_tokens": earlier.tokens,
                "earlier_cost_usd": earlier.cost_usd,
                "attempts": _count_attempts(result),
                "failed_items": result.failed_items,
                "seconds": round(self.seconds, 3),
            },
            "suspended": [waiting_data(one) for one in self.waiting],
            "parent": self.parent,
            "failure": None if failure is None or self.is_suspended else _failure_data(failure),
            "unpriced_models": result.unpriced_models,
            "hook_errors": len(result.hook_errors),
            "resume": None
            if self.is_complete or not self.db.is_durable
            else self._resume_command(self.db.command),
        }

    # ------------------------------------------------------------------ text

    def print(self, *, quiet: bool) -> None:
        """Print the outcome and the next command on stderr."""
        if not self.is_complete:
            self._print_stop()
        elif not quiet:
            self._print_success()

    def emit(self, *, json: bool) -> None:
        """Print the final state or the JSON object on stdout."""
        if json:
            emit(self.data())
        elif self.is_complete:
            emit(plain_state(self.result.final_state))

    def _print_success(self) -> None:
        result = self.result
        err.fitted(
            ("done", "bold green"),
            f": {result.status} in {format_duration(self.seconds)}; {self._usage_text()}",
        )
        self._print_notes()
        if self.db.is_durable:
            err.hint(f"details: {self.db.hint('show', id_word(result.run_id))}")

    def _print_stop(self) -> None:
        result, failure = self.result, self.result.failure
        head: Part = ("stroma: ", "bold red")
        status = f"run {clean(result.run_id)} is {result.status}"
        if self.is_suspended:
            self._print_suspension()
        elif self.is_drained:
            err.line(("stopped", "yellow"), f" by {self.stopped_by}: {status}")
        elif failure is None:
            is_cancelled = result.status is RunStatus.CANCELLED
            why = "cancelled by another process" if is_cancelled else "interrupted"
            err.line(head, f"{f'stopped by {self.stopped_by}' if self.stopped_by else why}: {status}")
        else:
            reason = describe_class(failure.failure_class, failure.reason)
            where = "" if failure.reason == "poison" else f"{self._failed_node(failure)}: "
            err.fitted(head, f"{status}: {where}{reason}")
            err.fitted(f"  why: {clean(str(failure), 1000)}")
            states = [(event.input_state, event.output_state) for event in result.trace.walk()]
            shown = Secrets(values=states).mask_error(failure.exception)
            for line in last_frame(shown, of_any=False):
                err.line(f"  {line}")
            if self.exceeded not in (None, failure.exception):
                err.fitted(f"  and: {self.exceeded}")
            if is_debugging():
                err.write("".join(traceback.format_exception(shown)))
        stored = "; finished nodes are stored" if self.db.is_durable else ""
        err.fitted(f"  spent: {self._usage_text()}{stored}")
        self._print_notes()
        err.hint(f"  {self._next_step()}")
        if failure is not None and self.db.is_durable and not self.is_suspended:
            err.hint(f"  details: {self.db.hint('show', id_word(result.run_id))}")

    def _print_suspension(self) -> None:
        run_id = self.result.run_id
        reasons = self.result.suspended
        is_asking = bool(unanswered(self.waiting)) or len(reasons) != 1
        what = "waiting for an answer" if is_asking else localize(describe_wait(reasons[0]))
        err.line(("suspended", "yellow"), f": run {clean(run_id)} is {clean(what, 1000)}")
        waiting = unanswered(self.waiting)
        for one in waiting:
            err.fitted(f"  {node_text(one)}: {clean(one.text, 1000)}  (asks for {answer_type(one)})")
        for reason in reasons if not waiting and len(reasons) > 1 else ():
            err.line(f"  {clean(reason, 1000)}")
        record = self.db.get_run(run_id)
        if record is not None:
            for line in waiting_hints(self.db, record, self.target, waiting):
                err.line(f"  {line}")

    def _print_notes(self) -> None:
        result = self.result
        note: Part = ("  note: ", "yellow")
        unpriced = [clean(model, 60) for model in result.unpriced_models if model != NO_MODEL]
        if unpriced:
            err.fitted(note, f"no price for {', '.join(unpriced)}, counted as $0; add it to KNOWN_MODELS")
        if len(unpriced) < len(result.unpriced_models):
            err.fitted(note, "tokens without a model count as $0; report the model with them")
        if result.failed_items:
            err.line(
                note,
                f"{pluralize(result.failed_items, 'item')} failed, the run continued without them",
                *self._rerun_hint(),
            )
        if result.hook_errors:
            err.line(
                note, f"{pluralize(len(result.hook_errors), 'hook call')} raised; the run is not affected"
            )

    def _rerun_hint(self) -> list[str]:
        if not self.db.is_durable:
            return []
        command = self.db.hint(
            "resume", id_word(self.result.run_id), self.target, options=("--retry-failed",)
        )
        return [f"; run them again: {command}"]

    def _usage_text(self) -> str:
        result = self.result
        wasted_tokens, wasted_cost = _wasted_usage(result)
        parts = [f"{format_usage(result.total_tokens, result.total_cost_usd)}"]
        if wasted_tokens or wasted_cost:
            parts.append(f"of which wasted {format_usage(wasted_tokens, wasted_cost)}")
        earlier = _earlier_usage(result)
        if earlier != Total():
            parts.append(f"before that {format_usage(earlier.tokens, earlier.cost_usd)}")
        return "; ".join(parts)

    def _failed_node(self, failure: Failure) -> str:
        """Return the failed node and its position; for a group, the child that failed it."""
        failed = [event for event in self.result.trace if event.failure is not None]
        if not failed or failed[-1].node_id != failure.node_id:
            return f"node {clean(failure.node_id, 100)!r}"
        event = failed[-1]
        groups: list[str] = []
        while children := [c for c in event.children if c.failure_message == failure.message]:
            groups.insert(0, f" in {clean(event.node_id, 100)}")
            # Siblings may have failed alike, and were cancelled before another attempt.
            stopped = failure.innermost
            event = next((c for c in children if c.children or c.attempt == stopped.attempt), children[-1])
        at = shown_place(place_text(event.position, event.branch))
        attempt = f", attempt {event.attempt}" if event.attempt > 1 else ""
        return f"node {clean(event.node_id, 100)!r} (at {at}{attempt}){''.join(groups)}"

    # ------------------------------------------------------------------ next command

    def _next_step(self) -> str:
        failure = self.result.failure
        if not self.db.is_durable:
            return (
                f"{self.db.name} is not durable, so the run cannot be resumed; use a file next time: "
                "--db FILE"
            )
        record = self.db.get_run(self.result.run_id)
        if failure is not None and failure.reason == "store":
            action = "fix the store, then resume with"
        elif record is None:
            action = "resume with"
        else:
            action = resume_advice(record, None if failure is None else failure.retry_after_seconds)
        return f"{action}: {self._resume_command(self.db.hint)}"

    def _resume_command(self, command: Callable[..., str]) -> str:
        """Return the command that resumes this run, with a larger budget if that is needed."""
        record = self.db.get_run(self.result.run_id)
        options = () if record is None else resume_options(record)
        exceeded = self.exceeded
        if exceeded is not None and not isinstance(exceeded, SharedBudgetExceeded):
            room = max(2 * exceeded.limit, 1.5 * exceeded.actual) or 1.0
            if exceeded.dimension == "tokens":
                options = ("--budget-tokens", f"{room:.0f}")
            elif exceeded.dimension == "cost":
                options = ("--budget-usd", format_amount(float(f"{room:.6g}"), "USD").removeprefix("$"))
        return command("resume", id_word(self.result.run_id), self.target, options=options)


def _earlier_usage(result: ExecutionResult) -> Total:
    """Return what earlier processes used for the execution."""
    cost_usd = round(result.total.cost_usd - result.total_cost_usd, 9)
    return Total(result.total.tokens - result.total_tokens, cost_usd)


def _wasted_usage(result: ExecutionResult) -> tuple[int, float]:
    """Return tokens and dollars of attempts without output. A group has no usage of its own."""
    lost, omitted = [e.usage for e in result.trace.walk() if e.output_state is None], result.trace.left_out()
    tokens = sum(used.tokens for used in lost) + sum(one.lost_tokens for one in omitted)
    return tokens, sum((used.cost_usd for used in lost), 0.0) + sum(one.lost_cost_usd for one in omitted)


def _count_attempts(result: ExecutionResult) -> int:
    """Count all attempts, also those that the trace has dropped."""
    return sum(1 for _ in result.trace.walk()) + sum(one.events for one in result.trace.left_out())


def _failure_data(failure: Failure) -> dict[str, Any]:
    return {
        "node_id": failure.node_id,
        "attempt": failure.attempt,
        "class": failure.failure_class.value,
        "reason": failure.reason,
        "exception": kind_of(failure.exception),
        "message": failure.message,
        "retry_after_seconds": failure.retry_after_seconds,
    }
