"""One log line per event, through ``logging`` or structlog."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Callable, Collection
from time import perf_counter
from typing import Any, Final

from stroma._utils.access import type_name
from stroma._utils.text import one_line
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import RunningNode
from stroma.failures.classes import FailureClass
from stroma.telemetry.content import DENY_KEYS, Content, ContentMode
from stroma.telemetry.conventions import attribution_of, note_run
from stroma.telemetry.observer import WRITING, AttemptEnd, ExporterHooks, Observer, is_returned
from stroma.trace.result import ExecutionResult

_NEEDS_QUOTES: Final = re.compile(r"""[\s="]""")
_quoted: Final = json.encoder.encode_basestring
_IS_PLAIN: Final = re.compile(r"[\w.:/+-]+", re.ASCII).fullmatch
#: What lines call the attributes of spans.
_FIELDS: Final = {"gen_ai.conversation.id": "conversation", "user.id": "user", "stroma.tags": "tags"}
_LEVELS = {"success": logging.INFO, "failure": logging.WARNING}


def log_hooks(
    logger: Any = None,
    *,
    content: ContentMode = "none",
    deny_keys: Collection[str] = DENY_KEYS,
    max_bytes: int = 2048,
) -> ExporterHooks:
    """Create hooks that log one line per event, with run_id, pipeline, node_id, attempt and others as fields.

    Args:
        logger: of ``logging`` (the fields are then its ``extra``) or of structlog. If none is given,
            structlog's as soon as the application has configured that, until then "stroma.events".
        content: see :class:`stroma.telemetry.content.Content`; with "redacted" states and messages are
            fields.
        deny_keys: names of fields whose values are never written.
        max_bytes: of one state or message.
    """
    return _Logs(logger, Content.make(content, deny_keys, max_bytes)).hooks()


class _Logs(Observer):
    name = "the log"

    def __init__(self, logger: Any, content: Content) -> None:
        super().__init__()
        self._content = content
        self._is_default = logger is None
        self._use(logging.getLogger("stroma.events") if logger is None else logger)

    def _use(self, logger: Any) -> None:
        self._logger = logger
        self._is_standard = isinstance(logger, (logging.Logger, logging.LoggerAdapter))
        self._write_line: Callable[[int, str, dict[str, Any]], None] = (
            _with_extra(logger) if self._is_standard else _with_fields(logger)
        )

    def _follow_structlog(self) -> None:
        """Write to structlog as soon as the application has configured it, maybe later than these hooks."""
        structlog: Any = sys.modules.get("structlog")
        if structlog is not None and structlog.is_configured():
            self._is_default = False
            self._use(structlog.get_logger("stroma.events"))

    def _is_off(self, level: int) -> bool:
        """Return True if nobody would see a line, for which nothing is then made."""
        if self._is_default:
            self._follow_structlog()
        return self._is_standard and not self._logger.isEnabledFor(level)

    def ignores(self, event: str) -> bool:
        """Return True for the start of nodes where nobody would see it, which is 7 us less for a node."""
        return event == "on_node_start" and self._is_off(logging.DEBUG)

    @property
    def destination(self) -> object:
        # structlog gives a new proxy to each who asks.
        return self._logger if self._is_standard else self

    def _write(self, level: int, event: str, fields: Callable[[], dict[str, Any]]) -> None:
        """Write a line, whose fields are made only if somebody sees it."""
        if self._is_off(level):
            return
        token = WRITING.set(True)
        try:
            self._write_line(level, event, fields())
        finally:
            WRITING.reset(token)

    def run_started(self, run: ReliabilityContext, state: dict[str, Any]) -> None:
        run.notes[self] = perf_counter()
        note_run(run)
        if is_returned(run):
            return
        resumed = {} if run.first_traceparent is None else {"first_traceparent": run.first_traceparent}
        about = {"execution": run.execution, **resumed}
        self._write(
            logging.INFO,
            "run started",
            lambda: {**_of_run(run), **about, "input": self._content.state(run, state)},
        )

    def run_ended(self, run: ReliabilityContext, result: ExecutionResult) -> None:
        started = run.notes.pop(self, None)
        failed = AttemptEnd.finally_(result)
        level = logging.INFO if failed is None or is_returned(run) else logging.ERROR
        seconds = {} if started is None else {"duration_s": round(perf_counter() - started, 6)}

        def fields() -> dict[str, Any]:
            about = {
                **_of_run(run),
                "status": result.status.value,
                "tokens": result.total_tokens,
                "cost_usd": result.total_cost_usd,
                **seconds,
            }
            if failed is None or result.failure is None:
                return about
            return about | self._failure(run, failed) | {"failed_node_id": result.failure.node_id}

        # Whoever ran it has written about its end, and at ERROR if it failed.
        self._write(level, "run returned" if is_returned(run) else "run ended", fields)

    def attempt_started(self, node: RunningNode, state: dict[str, Any]) -> None:
        self._write(
            logging.DEBUG,
            "node started",
            lambda: {**_of_node(node), "input": self._content.state(node.ctx, state)},
        )

    def attempt_ended(self, node: RunningNode, ended: AttemptEnd) -> None:
        level = _LEVELS.get(ended.outcome, logging.INFO)
        self._write(level, f"node {ended.outcome}", lambda: self._end_of(node, ended))

    def _end_of(self, node: RunningNode, ended: AttemptEnd) -> dict[str, Any]:
        usage, fields = node.usage, _of_node(node)
        fields["outcome"] = ended.outcome
        fields["duration_ms"] = round(node.duration_ms or 0.0, 3)
        if usage.tokens or usage.cost_usd:
            fields["tokens"], fields["cost_usd"] = usage.tokens, usage.cost_usd
            fields["model"] = usage.model
        if ended.output is not None:
            fields["output"] = self._content.state(node.ctx, ended.output)
        if ended.error is not None:
            fields |= self._failure(node.ctx, ended)
        if node.redelivered:
            fields["redelivered"] = True
        return fields

    def retrying(
        self, node: RunningNode, attempt: int, delay_seconds: float, failure_class: FailureClass
    ) -> None:
        about = {"attempt": attempt, "delay_s": round(delay_seconds, 3), "failure_class": failure_class.value}
        self._write(logging.INFO, "node retried", lambda: {**_of_node(node), **about})

    def skipped(self, node: RunningNode) -> None:
        if not is_returned(node.ctx):
            self._write(logging.INFO, "node restored", lambda: _of_node(node))

    def budget_warning(self, run: ReliabilityContext, dimension: str, used: float, limit: float) -> None:
        about = {"dimension": dimension, "used": used, "limit": limit}
        self._write(logging.WARNING, "budget nearly used up", lambda: {**_of_run(run), **about})

    def waiting(self, node: RunningNode, reason: str, seconds: float) -> None:
        about = {"reason": reason, "delay_s": round(seconds, 3)}
        self._write(logging.INFO, "node waits", lambda: {**_of_node(node), **about})

    def circuit_changed(self, run: ReliabilityContext, key: str, state: str) -> None:
        about = {"circuit": key, "state": state}
        self._write(logging.WARNING, "circuit changed", lambda: {**_of_run(run), **about})

    def limit_cooled_down(self, run: ReliabilityContext, limit: str, seconds: float) -> None:
        about = {"limit": limit, "delay_s": round(seconds, 3)}
        self._write(logging.WARNING, "limit cooldown", lambda: {**_of_run(run), **about})

    def _failure(self, run: ReliabilityContext, ended: AttemptEnd) -> dict[str, Any]:
        assert ended.error is not None
        fields = {
            "failure_class": ended.class_name,
            "error_type": type_name(ended.error),
            "reason": ended.reason,
        }
        message = self._content.message(ended.message)
        return fields if message is None else {**fields, "error_message": message}


def _with_extra(logger: Any) -> Callable[[int, str, dict[str, Any]], None]:
    def write(level: int, event: str, fields: dict[str, Any]) -> None:
        text_fields = " ".join(
            [
                f"{name}={_in_line(value)}"
                for name, value in fields.items()
                if value is not None and value != ""
            ]
        )
        # Systems that group lines do so by the text before its arguments are filled in.
        logger.log(level, f"{event}: %s", text_fields, extra=fields)

    return write


def _in_line(value: Any) -> Any:
    """Return a value as part of one line; quoted, so that no id or message can look like another field."""
    if not isinstance(value, str):
        if not isinstance(value, list):
            return value
        value = ",".join(value)
    if _IS_PLAIN(value):  # Most are: 0.1 us in place of 0.6.
        return value
    text = one_line(value)
    return _quoted(text) if _NEEDS_QUOTES.search(text) else text


def _with_fields(logger: Any) -> Callable[[int, str, dict[str, Any]], None]:
    def write(level: int, event: str, fields: dict[str, Any]) -> None:
        # By the name of the level, which all of its loggers have; those that wrap others know no log().
        getattr(logger, logging.getLevelName(level).lower())(event, **fields)

    return write


def _of_run(run: ReliabilityContext) -> dict[str, Any]:
    fields: dict[str, Any] = {"run_id": run.run_id, "pipeline": run.pipeline}
    for name, value in attribution_of(run).items():
        fields[_FIELDS[name]] = list(value) if isinstance(value, tuple) else value
    return fields


def _of_node(node: RunningNode) -> dict[str, Any]:
    fields = _of_run(node.ctx)
    fields["node_id"], fields["position"] = node.node_id, node.position
    fields["branch"], fields["attempt"] = node.branch, node.attempt
    return fields
