"""Traces as text that is the same for each run."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from stroma._utils.text import format_usd, typed
from stroma.trace.events import TraceEvent, place_text
from stroma.trace.plain import jsonable
from stroma.trace.result import ExecutionResult
from stroma.trace.trace import ExecutionTrace


def trace_snapshot(
    trace: ExecutionTrace | ExecutionResult, *, states: bool = True, hide: Collection[str] = ()
) -> str:
    """Return a trace, or a result, as text without times, durations and the run id.

    Nodes that ran concurrently are listed in the order of their places. ``states``: with the input and the
    output of each attempt. ``hide``: names of fields, at any depth, that are shown as ``...``.
    """
    lines: list[str] = []
    result = trace if isinstance(trace, ExecutionResult) else None
    source = trace.trace if isinstance(trace, ExecutionResult) else trace
    hidden = frozenset(hide)
    if result is not None:
        lines.append(f"{result.status}, {result.total_tokens} tokens, {format_usd(result.total_cost_usd)}")
        lines += [f"waits for {reason}" for reason in result.suspended]
    for event in _sorted(list(source)):
        lines += _lines(event, states, hidden)
    return "\n".join(lines).replace(source.run_id, "<run id>") + "\n"


def _sorted(events: list[TraceEvent]) -> list[TraceEvent]:
    return sorted(events, key=lambda event: (event.position, _branch(event), event.attempt))


def _branch(event: TraceEvent) -> tuple[int, ...]:
    return tuple(int(part) for part in event.branch.split(".") if part.isdecimal())


def _lines(event: TraceEvent, states: bool, hide: frozenset[str]) -> list[str]:
    at = place_text(event.position, event.branch)
    used = event.usage
    spent = f", {used.input_tokens}+{used.output_tokens} tokens" if used.tokens else ""
    model = f" of {used.model}" if used.model else ""
    line = f"{at} {event.node_id}, attempt {event.attempt}: {event.outcome}{spent}{model}"
    if event.failure is not None:
        line += f", {event.failure.value}" + (f" ({event.reason})" if event.reason else "")
    lines = [line]
    if event.failure_message is not None:
        lines += [f"    ! {text}" for text in typed(event.error_type, event.failure_message).splitlines()]
    if states:
        lines.append(f"    < {_text(event.input_state, hide)}")
        if event.output_state is not None:
            lines.append(f"    > {_text(event.output_state, hide)}")
    if event.left_out is not None:
        lines.append(f"    {event.left_out.events} attempts inside are counted, not stored")
    for child in _sorted(event.children):
        lines += [f"  {inner}" for inner in _lines(child, states, hide)]
    return lines


def _text(state: Any, hide: frozenset[str]) -> str:
    text = json.dumps(_state_json(jsonable(state), hide), ensure_ascii=False, sort_keys=True)
    return text.encode("utf-8", "backslashreplace").decode()  # A file holds no lone surrogates.


def _state_json(value: Any, hide: frozenset[str]) -> Any:
    if isinstance(value, dict):
        return {name: "..." if name in hide else _state_json(inner, hide) for name, inner in value.items()}
    return [_state_json(inner, hide) for inner in value] if isinstance(value, list) else value


def compare_with_file(text: str, path: Path, *, update: bool) -> None:
    """Compare a text with a file; raise AssertionError with the difference. ``update`` writes the file."""
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        return
    command = "write it with: pytest --stroma-update-snapshots"
    if not path.exists():
        raise AssertionError(f"no snapshot {path}; {command}")
    stored_text = path.read_text("utf-8")
    if stored_text != text:
        lines = difflib.unified_diff(
            stored_text.splitlines(), text.splitlines(), str(path), "this run", lineterm=""
        )
        raise AssertionError(
            "\n".join([f"the trace differs from {path}; if that is intended, {command}", *lines])
        )
