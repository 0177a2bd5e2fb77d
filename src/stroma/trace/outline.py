"""Outline of a run: its attempts as a tree of calls, with repeated calls of one node folded into one entry.

The terminal, the Gantt chart, the pages and the graph of recorded runs all draw this tree. It reads places of
attempts ("2", "2.0", "0.judge#1") as ``checkpoint/identity.py`` writes them; it calls no user code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple
from urllib.parse import unquote

from stroma._utils.text import clean, format_duration, format_usd
from stroma.failures.classes import describe_class
from stroma.trace.events import RECEIVES, SLEEPS
from stroma.trace.story import Bar

EntryKind = Literal["node", "map", "sleep", "question", "message", "fold"]
#: Kinds of the entries of waits.
WAITS: Final = ("sleep", "question", "message")

#: Attempts that are drawn; of a run with more, the failed ones go first.
MOST: Final = 2000
#: Texts of what became of a question, or of a wait for a message.
ANSWERS: Final = {
    "open": "waiting for an answer",
    "answered": "answered",
    "expired": "no answer in time",
    "receiving": "waiting",
    "received": "received",
    "missed": "none in time",
}
#: Colours of statuses, outcomes and classes.
Tone = Literal["good", "bad", "warn", "run", "queued", "dim"]
_TONES: Final[dict[str, Tone]] = {
    "COMPLETED": "good",
    "RESUMED": "good",
    "success": "good",
    "answered": "good",
    "received": "good",
    "FAILED": "bad",
    "PARTIAL": "bad",
    "failure": "bad",
    "TERMINAL": "bad",
    "RUNNING": "run",
    "running": "run",
    "QUEUED": "queued",
    "CANCELLED": "dim",
    "cancelled": "dim",
    "forked": "dim",
    "slept": "dim",
}
#: State of a call: it succeeded at once or after a retry, failed, was stopped, or has no attempt.
CallState = Literal["ok", "retried", "failed", "stopped", "none"]
_MARK: Final = "#"


def tone_of(word: str) -> Tone:
    """Return the colour of the status of a run, the outcome of an attempt, or the class of a failure."""
    return _TONES.get(word, "warn")


def duration(took_ms: float, function_ms: float | None = None) -> str:
    """Return how long attempts took, and how long functions ran in them where that is less."""
    took = format_duration(took_ms / 1000)
    ran = took if function_ms is None or took_ms - function_ms < 1 else format_duration(function_ms / 1000)
    return took if ran == took else f"{took} (functions {ran})"


def bar_title(bar: Bar) -> str:
    """Return the text of an attempt for a reader without colours."""
    if bar.outcome in ANSWERS:
        return f"{clean(bar.node_id, 200)}, {ANSWERS[bar.outcome]}"
    if bar.outcome in SLEEPS:
        return clean(bar.node_id, 200)
    why = f": {describe_class(bar.failure_class, bar.reason)}" if bar.failure_class else ""
    message = f": {clean(bar.message, 200)}" if bar.message else ""
    took = duration(bar.took_ms, bar.function_ms)
    return f"{clean(bar.node_id, 100)}, attempt {bar.attempt}, {bar.outcome}{why}, {took}{message}"


def select_bars(bars: Sequence[Bar]) -> list[Bar]:
    """Return the bars to draw, at most ``MOST``: those of failures first."""
    if len(bars) <= MOST:
        return list(bars)
    ranked = sorted(range(len(bars)), key=lambda i: (bars[i].outcome == "success", i))[:MOST]
    return [bars[i] for i in sorted(ranked)]


class PlacedCall(NamedTuple):
    """A call in the code of a flow or node, as its identity has it.

    Attributes:
        kind: "" for a step, "*" for a map, "!" for a sleep or a question, "?" for a wait for a message.
        name: the node id; "" if the call has a key.
        number: 0-based number of the call in its scope, or its key.
        scope: the asyncio task that made it, in plain code; "" for the first one, and in a flow.
    """

    kind: str
    name: str
    number: str
    scope: str


def parse_call(part: str) -> PlacedCall | None:
    """Return the call in the last part of a place; None for a position or the index of a child."""
    scope, _, text = part.rpartition("/")
    name, mark, number = text.rpartition(_MARK)
    if not mark:
        return None
    kind = name[:1] if name[:1] in ("*", "!", "?") else ""
    return PlacedCall(kind, unquote(name[len(kind) :]), unquote(number.partition("@")[0]), scope)


def shown_place(at: str) -> str:
    """Return a place as people read it: ids of nodes have their own dots again."""
    return clean(unquote(at), 200)


def folded_part(part: str, label: str = "") -> str:
    """Return the last part of a place without the number of a call: the same for repeated calls of a node.

    ``label``: id of the node; the name in the call by default. Sleeps, questions and waits are not repeated.
    """
    call = parse_call(part)
    if call is None or call.kind in ("!", "?"):
        return part
    return f"{call.kind}{label or call.name or call.number}/{call.scope}"


@dataclass(slots=True)
class OutlineEntry:
    """A line of an outline.

    Attributes:
        at: the place; of a fold that of its first call.
        label: the text that names it, as stored: clean it before it is shown.
        kind: "fold" for repeated calls of one node, which are its entries.
        bars: its attempts in order of their start; [] for a map, and for a group, flow or node that has not
            ended.
        call: None for a position, and for the child of a group.
    """

    at: str
    label: str
    kind: EntryKind
    bars: list[Bar] = field(default_factory=list)
    entries: list[OutlineEntry] = field(default_factory=list)
    call: PlacedCall | None = None

    @property
    def drawn_bars(self) -> list[Bar]:
        """The bars of its line: its attempts; of what has none, the attempts inside it."""
        if self.bars:
            return self.bars
        inside = [entry for entry in self.entries if entry.kind not in WAITS]
        return [bar for entry in inside for bar in entry.drawn_bars]

    @property
    def all_bars(self) -> list[Bar]:
        """Its attempts and those of everything inside it, each once."""
        inside = [bar for entry in self.entries for bar in entry.all_bars]
        return inside if self.kind == "fold" else [*self.bars, *inside]

    @property
    def has_failed(self) -> bool:
        """True if its last attempt failed; see :attr:`last_failure`."""
        return self.last_failure is not None

    @property
    def last_failure(self) -> Bar | None:
        """The attempt that failed it in the end; of a Pipeline in a flow, that of its last node."""
        if self.bars:
            return self.bars[-1] if self.bars[-1].outcome == "failure" else None
        calls = [one for one in self.entries if one.kind not in WAITS]
        return max(calls, key=lambda one: one.ended_ms).last_failure if calls else None

    @property
    def was_retried(self) -> bool:
        """True if it, or anything inside it, took more than one attempt."""
        retried = self.kind != "fold" and len(self.bars) > 1
        return retried or any(entry.was_retried for entry in self.entries)

    @property
    def calls(self) -> list[OutlineEntry]:
        """The calls that the line stands for."""
        return self.entries if self.kind == "fold" else [self]

    @property
    def state(self) -> CallState:
        """The state of one call."""
        if not self.bars:
            return "failed" if self.has_failed else "none"
        if self.bars[-1].outcome in ("success", "forked"):
            return "retried" if self.was_retried else "ok"
        return "failed" if self.has_failed else "stopped"

    @property
    def counts(self) -> str:
        """The states of its calls in words; those that were retried are among the ok ones."""
        return count_states(call.state for call in self.calls)

    @property
    def tone(self) -> Tone:
        """The colour of its line: only what failed in the end is red. Of several calls the worst counts."""
        last = [call.bars[-1] if call.bars else call.last_failure for call in self.calls]
        tones: list[Tone] = [tone_of(bar.outcome) for bar in last if bar is not None] or ["dim"]
        return min(tones, key=("bad", "warn", "run", "queued", "good", "dim").index)

    @property
    def spent(self) -> tuple[int, float]:
        """Tokens and US dollars of its attempts and of everything inside it."""
        bars = self.all_bars
        return sum(bar.tokens for bar in bars), sum(bar.cost_usd for bar in bars)

    @property
    def times_ms(self) -> list[float]:
        """The time of each attempt; of a flow the time of all its processes, from its first call on."""
        times = [bar.took_ms for bar in self.bars]
        if not (self.has_steps and times):
            return times
        began = min(self.began_ms, *(entry.began_ms for entry in self.entries))
        return [max(self.ended_ms - began, sum(times))]  # Its last attempt is only that of the last process.

    @property
    def took(self) -> str:
        """The time that its attempts took together; "" without one."""
        ran = sum(bar.took_ms if bar.function_ms is None else bar.function_ms for bar in self.bars)
        return duration(sum(self.times_ms), None if self.has_steps else ran) if self.bars else ""

    @property
    def is_map(self) -> bool:
        """True for a map, in a list or in a flow."""
        return self.kind == "map" or (self.kind == "node" and self.label.startswith("map_over("))

    @property
    def has_steps(self) -> bool:
        """True if code made calls inside it: of a flow, or of a node that calls others."""
        return self.kind != "fold" and any(entry.call is not None for entry in self.entries)

    @property
    def began_ms(self) -> float:
        """Start of its first attempt, or of the first one inside it."""
        starts = [bar.began_ms for bar in self.bars] or [entry.began_ms for entry in self.entries]
        return min(starts, default=0.0)

    @property
    def ended_ms(self) -> float:
        """End of its last attempt, or of the last one inside it."""
        ends = [bar.began_ms + bar.took_ms for bar in self.bars] or [one.ended_ms for one in self.entries]
        return max(ends, default=0.0)

    def walk(self, depth: int = 0) -> Iterator[tuple[int, OutlineEntry]]:
        """Yield the entry and all inside it, each with its depth."""
        yield depth, self
        for entry in self.entries:
            yield from entry.walk(depth + 1)


def count_states(states: Iterable[CallState]) -> str:
    """Return the number of calls in each state, in words."""
    counts = Counter(states)
    ok = counts["ok"] + counts["retried"]
    texts = [f"{ok:,} ok", f"{counts['retried']:,} retried", f"{counts['failed']:,} failed"]
    texts += [f"{counts['stopped']:,} stopped"] if counts["stopped"] else []
    texts += [f"{counts['none']:,} without an attempt"] if counts["none"] else []
    return ", ".join(texts)


def cost_text(tokens: int, cost_usd: float) -> str:
    """Return a cost; "" if nothing was used."""
    return format_usd(cost_usd) if tokens or cost_usd else ""


def outline(bars: Iterable[Bar], waits: Iterable[Bar] = (), pipeline: str = "") -> list[OutlineEntry]:
    """Return the attempts of a run as a tree, nothing folded.

    Children of groups come by their index, calls in the order in which they started. ``waits``: those of
    flows, each as a bar. ``pipeline``: its name, for a flow without an attempt of its own.
    """
    known: dict[str, OutlineEntry] = {}
    for bar in bars:
        entry = known.get(bar.at)
        if entry is None:
            entry = known[bar.at] = OutlineEntry(bar.at, bar.node_id, "node", call=_call_at(bar.at))
        entry.bars.append(bar)
    for bar in waits:
        kind: EntryKind = (
            "sleep" if bar.outcome in SLEEPS else "message" if bar.outcome in RECEIVES else "question"
        )
        known.setdefault(bar.at, OutlineEntry(bar.at, bar.node_id, kind, [bar], call=_call_at(bar.at)))
    for at in list(known):
        while parent := at.rpartition(".")[0]:
            if parent in known:
                break
            known[parent] = _without_attempts(parent)
            at = parent
    top: list[OutlineEntry] = []
    for at, entry in known.items():
        if len(entry.bars) > 1:
            entry.bars.sort(key=lambda bar: (bar.began_ms, bar.attempt))
        parent = at.rpartition(".")[0]
        (known[parent].entries if parent else top).append(entry)
    if len(top) == 1 and top[0].has_steps and not top[0].bars:
        top[0].label = pipeline or "flow"
    return _sorted(top)


def _sorted(entries: list[OutlineEntry]) -> list[OutlineEntry]:
    for entry in entries:
        if entry.entries:
            entry.entries = _sorted(entry.entries)

    def key(entry: OutlineEntry) -> tuple[float, str]:
        part = entry.at.rpartition(".")[2]
        return (float(part), "") if part.isdecimal() else (entry.began_ms, part)

    return sorted(entries, key=key)


def _call_at(at: str) -> PlacedCall | None:
    return parse_call(at.rpartition(".")[2]) if _MARK in at else None


def _without_attempts(at: str) -> OutlineEntry:
    """Return the entry of a place that has no attempt: of a map, or of what has not ended."""
    call = _call_at(at)
    if call is None:
        return OutlineEntry(at, "(not finished)", "node")
    if call.kind == "*":
        return OutlineEntry(
            at, f"map over {call.name}" if call.name else f"map {call.number}", "map", call=call
        )
    # A flow or group inside that has not ended, or a Pipeline inside, which has no attempts of its own.
    return OutlineEntry(at, call.name or call.number, "node", call=call)


def fold(entries: Sequence[OutlineEntry], *, items: bool = False) -> list[OutlineEntry]:
    """Return an outline with two or more calls of a node in one flow or task folded, adjacent or not.

    Items of a map of a flow are folded too, and with ``items`` those of a map in a list. Other children of
    groups and waits are not.
    """
    return _fold(entries, None, items)


def _fold(entries: Sequence[OutlineEntry], parent: OutlineEntry | None, items: bool) -> list[OutlineEntry]:
    in_map = parent is not None and (parent.kind == "map" or (items and parent.is_map))
    folds: dict[str, list[OutlineEntry]] = {}
    for entry in entries:
        folds.setdefault(_fold_key(entry, in_map), []).append(_folded_inside(entry, items))
    folded: list[OutlineEntry] = []
    for group in folds.values():
        first = group[0]
        if len(group) == 1:
            folded.append(first)
            continue
        bars = [bar for entry in group for bar in entry.bars]
        label = f"{first.label} x{len(group)}"
        folded.append(OutlineEntry(first.at, label, "fold", bars, group, first.call))
    return folded


def _folded_inside(entry: OutlineEntry, items: bool) -> OutlineEntry:
    if not entry.entries:
        return entry
    inside = _fold(entry.entries, entry, items)
    return OutlineEntry(entry.at, entry.label, entry.kind, entry.bars, inside, entry.call)


def _fold_key(entry: OutlineEntry, in_map: bool) -> str:
    if in_map:
        return f"item {entry.label}"
    return folded_part(entry.at.rpartition(".")[2], entry.label)
