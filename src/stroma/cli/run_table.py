"""The attempts of a run as a table, with maps and loops folded, and rejected outputs below it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Final

from stroma._utils.text import clean, format_duration, pluralize
from stroma.checkpoint.history import place_of
from stroma.checkpoint.records import AttemptRecord
from stroma.cli.output import Part, out, table
from stroma.trace.outline import duration, fold, outline
from stroma.trace.rejected import MISSING, RejectedOutput
from stroma.trace.story import Bar, waits
from stroma.trace.terminal import RunLine, lines_of

__all__ = ["print_all_rejected", "print_attempts"]

_HEADER: Final = [
    "AT",
    "NODE",
    "TRY",
    "OUTCOME",
    "CLASS",
    "REASON",
    "TIME",
    "TOKENS",
    "COST",
    "MODEL",
    "MESSAGE",
]
_RIGHT: Final = ("TRY", "BEGAN", "WAITED", "TIME", "FUNCTIONS", "TOKENS", "COST")
#: Columns that a narrow terminal does without, in this order; with --timing the times stay longest.
_SPARE: Final = ["MODEL", "CLASS", "TOKENS", "AT", "REASON", "TRY", "TIME", "COST", "OUTCOME"]
_TIMING_SPARE: Final = [
    "FUNCTIONS",
    "MODEL",
    "CLASS",
    "TOKENS",
    "COST",
    "AT",
    "REASON",
    "TRY",
    "WAITED",
    "OUTCOME",
    "BEGAN",
    "TIME",
]
_SHOWN_REJECTED: Final = 3  # rejected outputs below the attempts
_SHOWN_COMPLAINTS: Final = 10  # of each


def print_attempts(
    bars: Sequence[Bar],
    flow_waits: Sequence[Bar],
    is_selected: Callable[[Bar], bool] | None,
    *,
    as_tree: bool,
    unfold: bool,
    timing: bool,
) -> None:
    """Print a line for each selected attempt; repeated calls and the items of a map are one line."""
    out.line()
    entries = outline(bars, flow_waits if as_tree and is_selected is None else ())
    if is_selected is None and not unfold:
        entries = fold(entries, items=True)
    lines = list(lines_of(entries, is_selected or (lambda _bar: True)))
    header = list(_HEADER)
    cells = [line.cells() for line in lines]
    if timing:
        header[6:7] = ["BEGAN", "WAITED", "TIME", "FUNCTIONS"]
        _add_timing(lines, cells, bars)
        if not any(row.get("FUNCTIONS") for row in cells):  # They took the whole time of each attempt.
            header.remove("FUNCTIONS")
    rows: list[list[Part]] = []
    for number, (line, row) in enumerate(zip(lines, cells, strict=True)):
        row["NODE"] = (_branches(lines, number) if as_tree else "  " * line.depth) + row["NODE"]
        texts: list[Part] = [row.get(name, "") for name in header]
        if row.get("OUTCOME"):
            texts[header.index("OUTCOME")] = (row["OUTCOME"], line.style)
        rows.append(texts)
    right = frozenset(header.index(name) for name in _RIGHT if name in header)
    spare = [header.index(name) for name in (_TIMING_SPARE if timing else _SPARE) if name in header]
    table(out, header, rows, right=right, spare=spare)


def _branches(lines: Sequence[RunLine], number: int) -> str:
    """Return the tree lines in front of a name."""
    depth = lines[number].depth
    branches = []
    for level in range(1, depth + 1):
        more = next((line.depth for line in lines[number + 1 :] if line.depth <= level), 0) == level
        branches.append(("├─ " if more else "└─ ") if level == depth else ("│  " if more else "   "))
    return "".join(branches)


def _add_timing(lines: Sequence[RunLine], cells: Sequence[dict[str, str]], bars: Sequence[Bar]) -> None:
    waited = {id(bar): took for bar, _, took in waits(bars)}
    for line, row in zip(lines, cells, strict=True):
        bar = line.bar
        if bar is not None:
            row["BEGAN"] = f"+{bar.began_ms / 1000:.3f} s"
            row["WAITED"] = format_duration(waited[id(bar)] / 1000) if id(bar) in waited else ""
            row["TIME"] = duration(bar.took_ms)
            row["FUNCTIONS"] = "" if bar.function_ms is None else duration(bar.function_ms)


def print_all_rejected(outputs: Sequence[tuple[AttemptRecord, RejectedOutput]]) -> None:
    """Print the last outputs that broke their contract, and how many there are if these are not all."""
    for attempt, rejected in outputs[-_SHOWN_REJECTED:]:
        _print_rejected(attempt, rejected)
    if len(outputs) > _SHOWN_REJECTED:
        more = f"the last {_SHOWN_REJECTED} of {len(outputs)} rejected outputs; all of them: --rejected"
        out.line((more, "dim"))


def _print_rejected(attempt: AttemptRecord, rejected: RejectedOutput) -> None:
    """Print the value beside each complaint of the contract."""
    out.line()
    node = f"{clean(attempt.node_id, 100)} at {place_of(attempt)}, attempt {attempt.attempt}"
    out.line((f"rejected output of {node}", "bold"))
    for one in rejected.complaints[:_SHOWN_COMPLAINTS]:
        value = rejected.at(one.path)
        came = "" if value is MISSING else f"; got {clean(json.dumps(value, ensure_ascii=False), 160)}"
        out.fitted(f"  {clean(one.field, 100)}: ", (clean(one.message, 300), "red"), came)
    more = rejected.more + max(0, len(rejected.complaints) - _SHOWN_COMPLAINTS)
    if more:
        out.line((f"  ... and {pluralize(more, 'complaint')} more", "dim"))
