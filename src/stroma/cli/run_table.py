"""The table of a run's attempts, with maps and loops folded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final, Protocol

from stroma._utils.text import clean, format_duration, format_usd, pluralize
from stroma.checkpoint.history import bar_of, place_of
from stroma.checkpoint.records import AttemptRecord
from stroma.cli.output import Part, out, table
from stroma.trace.gantt import duration
from stroma.trace.outline import WAITS, OutlineEntry, fold, outline
from stroma.trace.story import Bar
from stroma.trace.story import waits as find_waits

__all__ = ["print_attempts"]

_HEADER: Final = (
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
)
_STYLES: Final = {"success": "green", "failure": "red"}
_RIGHT: Final = ("TRY", "BEGAN", "WAITED", "TIME", "FUNCTIONS", "TOKENS", "COST")
_SHOWN_FAILED: Final = 5  # calls that failed, below the line that folds them
#: Columns that a narrow terminal does without, in this order.
_SPARE: Final = (
    "MODEL",
    "CLASS",
    "TOKENS",
    "AT",
    "REASON",
    "TRY",
    "TIME",
    "COST",
    "OUTCOME",
)
#: The same with --timing: what was asked for stays longest.
_TIMING_SPARE: Final = (
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
)


class TableView(Protocol):
    """Options of the table; those of the command have these names."""

    @property
    def as_tree(self) -> bool: ...
    @property
    def unfold(self) -> bool: ...
    @property
    def timing(self) -> bool: ...


def print_attempts(
    attempts: list[AttemptRecord],
    waits: Sequence[Bar],
    selected: list[AttemptRecord],
    view: TableView,
) -> None:
    """Print a line for each selected attempt; repeated calls and the items of a map are one line, unless selected."""
    out.line()
    rows = list(_rows(attempts, waits, selected, view))
    header: list[str] = list(_HEADER)
    if view.timing:
        header[6:7] = ["BEGAN", "WAITED", "TIME", "FUNCTIONS"]
        _add_timing(rows, selected)
        if not any(row[9] for _, row in rows):  # Functions took the whole time of each attempt.
            del header[9]
            for _, row in rows:
                del row[9]
    right = frozenset(header.index(name) for name in _RIGHT if name in header)
    spare = [header.index(name) for name in (_TIMING_SPARE if view.timing else _SPARE) if name in header]
    table(out, header, [row for _, row in rows], right=right, spare=spare)


def _rows(
    attempts: list[AttemptRecord], waits: Sequence[Bar], selected: list[AttemptRecord], view: TableView
) -> Iterator[tuple[AttemptRecord | None, list[Part]]]:
    """Yield a row for each selected attempt, and one for each group, map or flow that has no attempt of its own."""
    first = min((a.started_ns for a in attempts), default=0)
    records = {bar_of(a, first).key: a for a in attempts}
    draws_all = len(selected) == len(attempts)
    entries = outline((bar_of(a, first) for a in attempts), waits if draws_all and view.as_tree else ())
    if draws_all and not view.unfold:
        entries = fold(entries, items=True)
    chosen = {id(a) for a in selected}
    lines: list[tuple[int, AttemptRecord | None, list[Part]]] = []

    def add(entry: OutlineEntry, depth: int) -> bool:
        """Add the lines of an entry and return True, unless nothing in it is selected."""
        start = len(lines)
        name = clean(entry.label, 60 if entry.kind in WAITS else 40)
        bars = [bar for bar in entry.bars if bar.key in records and id(records[bar.key]) in chosen]
        if entry.kind == "fold":
            lines.append((depth, None, [entry.at, name, *_fold_cells(entry)]))
            for call in _failed_calls(entry)[:_SHOWN_FAILED]:
                record = records[call.bars[-1].key]
                lines.append((depth + 1, record, _cells(record, clean(call.label, 40))))
            return True
        if entry.kind in WAITS:
            lines.append((depth, None, [entry.at, name, "", entry.bars[0].outcome, *_blank(4)]))
            return True
        lines.extend((depth, records[bar.key], _cells(records[bar.key], name)) for bar in bars)
        if not bars:
            lines.append((depth, None, [entry.at, name, *_blank(2)]))
        inside = [add(child, depth + 1) for child in entry.entries]
        if bars or any(inside):
            return True
        del lines[start:]
        return False

    for entry in entries:
        add(entry, 0)
    for number, (depth, attempt, row) in enumerate(lines):
        label = row[1]
        assert isinstance(label, str)
        row[1] = (_branches(lines, number) if view.as_tree else "  " * depth) + label
        yield attempt, row


def _blank(column: int) -> list[Part]:
    """Return empty cells from a column on."""
    return [""] * (len(_HEADER) - column)


def _cells(a: AttemptRecord, name: str) -> list[Part]:
    is_committed = a.output is not None and a.outcome != "success"
    outcome = (
        f"{a.outcome}, damaged" if a.damaged else f"{a.outcome}, output stored" if is_committed else a.outcome
    )
    return [
        place_of(a),
        name,
        str(a.attempt),
        (outcome, _STYLES.get(a.outcome, "yellow")),
        a.failure_class or "",
        clean(a.reason or "", 20),
        duration(a.duration_ms, a.function_ms or None),
        f"{a.tokens:,}" if a.tokens else "",
        format_usd(a.cost_usd) if a.tokens or a.cost_usd else "",
        clean(a.model or "", 30),
        clean(a.text or "", 120),
    ]


def _failed_calls(entry: OutlineEntry) -> list[OutlineEntry]:
    """Return the calls of a fold that failed."""
    return [call for call in entry.entries if call.has_failed]


def _fold_cells(entry: OutlineEntry) -> list[Part]:
    """Return the cells of repeated calls: their attempts, what became of them, and the sums."""
    ended = [call for call in entry.entries if call.bars]
    failed = len(_failed_calls(entry))
    ok = sum(call.bars[-1].outcome == "success" for call in ended)
    retried = sum(call.was_retried for call in ended)
    others = Counter(
        call.bars[-1].outcome for call in ended if call.bars[-1].outcome != "success" and not call.has_failed
    )
    outcome: Part = (f"{failed:,} failed", "red") if failed else ""
    if ended and not failed:
        rest = next(iter(others), "")
        outcome = (rest, "yellow") if rest else ("success", "green")
    is_map = ended and ended[0].call is None
    texts = [f"{ok:,} ok", f"{retried:,} retried", f"{failed:,} failed"]
    texts += [f"{count:,} {name}" for name, count in others.items()]
    message = (
        f"{pluralize(len(entry.entries), 'item' if is_map else 'call')}: {', '.join(texts)}" if ended else ""
    )
    spending = entry.all_bars
    tokens = sum(bar.tokens for bar in spending)
    cost = sum(bar.cost_usd for bar in spending)
    took = duration(sum(bar.took_ms for bar in entry.bars), None) if entry.bars else ""
    tries = f"{len(entry.bars):,}" if len(entry.bars) > len(entry.entries) else ""
    figures: list[Part] = [took, f"{tokens:,}" if tokens else "", format_usd(cost) if tokens or cost else ""]
    return [tries, outcome, "", "", *figures, "", message]


def _branches(lines: list[tuple[int, AttemptRecord | None, list[Part]]], number: int) -> str:
    """Return the tree lines in front of a name."""
    depth = lines[number][0]
    branches = []
    for level in range(1, depth + 1):
        following = next((d for d, *_ in lines[number + 1 :] if d <= level), 0)
        more = following == level
        branches.append(("├─ " if more else "└─ ") if level == depth else ("│  " if more else "   "))
    return "".join(branches)


def _add_timing(rows: list[tuple[AttemptRecord | None, list[Part]]], attempts: list[AttemptRecord]) -> None:
    first = min(a.started_ns for a in attempts)
    bars = {id(a): bar_of(a, first) for a in attempts}
    waited = {bar.key: took for bar, _, took in find_waits(bars.values())}
    for attempt, row in rows:
        if attempt is None:
            row[6:7] = ["", "", row[6], ""]
            continue
        bar = bars[id(attempt)]
        wait = waited.get(bar.key)
        row[6:7] = [
            f"+{bar.began_ms / 1000:.3f} s",
            "" if wait is None else format_duration(wait / 1000),
            format_duration(bar.took_ms / 1000),
            "" if bar.function_ms is None else format_duration(bar.function_ms / 1000),
        ]
