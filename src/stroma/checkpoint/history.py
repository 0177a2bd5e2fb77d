"""History of runs in a store, for the command line and the web interface.

Everything is read through the public reading functions of a journal store; nothing is imported or run for it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any, Final, Literal, NamedTuple

from stroma.checkpoint.durable.states import AsyncStates
from stroma.checkpoint.errors import CheckpointNotFound, CorruptCheckpoint
from stroma.checkpoint.identity import is_called
from stroma.checkpoint.protocols import Waiting
from stroma.checkpoint.records import AttemptPage, AttemptRecord, RunPage, RunQuery, RunRecord
from stroma.contracts.schema import Schema
from stroma.trace.plain import jsonable
from stroma.trace.redaction import HIDDEN, Redact, hidden_values, hide_state, hide_words, without
from stroma.trace.story import Bar, StopCause, Story

__all__ = [
    "FAILED",
    "FINISHED",
    "Change",
    "History",
    "Inputs",
    "NodeDiff",
    "Payload",
    "Redact",
    "changes",
    "compare",
    "in_order",
    "is_gone",
    "place_of",
    "status_of",
    "waste",
]

#: Statuses of runs that failed, and of those that came to their end.
FAILED: Final = ("FAILED", "PARTIAL")
FINISHED: Final = ("COMPLETED", "RESUMED")

_MOST_CHANGES: Final = 1000
#: Bytes of a state that is drawn, and of all that are drawn of one run.
_ONE_STATE: Final = 1_000_000
_ALL_STATES: Final = 20_000_000


#: The id of a map, with the name of the field that it goes over.
_MAP: Final = re.compile(r"map_over\((.+?), ")
_NONE: Final[frozenset[str]] = frozenset()


class Payload(NamedTuple):
    """A state as it is shown: plain JSON data, or why there is none."""

    value: Any
    problem: str | None = None


def place_of(attempt: AttemptRecord) -> str:
    """Return the place of an attempt in its run: "2", or "2.0" for a child of a group."""
    return f"{attempt.position}.{attempt.branch}" if attempt.branch else str(attempt.position)


def in_order(attempts: Iterable[AttemptRecord]) -> list[AttemptRecord]:
    """A group before its children, and these by their place in it, not as text: item 10 after item 9.

    Steps that a node calls stand in the order in which they began, each with what is inside it.
    """
    found = list(attempts)
    #: When each step that code called began, or the first thing inside it.
    began: dict[tuple[int, str], int] = {}
    for one in found:
        if is_called(one.branch):
            for place in _places_around(one.branch):
                at = (one.position, place)
                began[at] = min(began.get(at, one.started_ns), one.started_ns)

    def key(attempt: AttemptRecord) -> tuple[int, list[tuple[int, str]], int, int]:
        branch = [
            (int(part), "") if part.isdecimal() else (began.get((attempt.position, place), -1), part)
            for place in _places_around(attempt.branch)
            for part in (place.rpartition(".")[2],)
        ]
        return attempt.position, branch, attempt.started_ms, attempt.attempt

    return sorted(found, key=key)


def _places_around(branch: str) -> list[str]:
    """Each place on the way to a branch, the branch itself last: of "0.2" there are "0" and "0.2"."""
    return (
        list(itertools.accumulate(branch.split("."), lambda around, part: f"{around}.{part}"))
        if branch
        else []
    )


def waste(attempts: Iterable[AttemptRecord]) -> tuple[int, float]:
    """Tokens and US dollars of the attempts that committed nothing."""
    lost = [attempt for attempt in attempts if attempt.output_bytes is None]
    return sum(attempt.tokens for attempt in lost), sum(attempt.cost_usd for attempt in lost)


def is_gone(record: RunRecord) -> bool:
    """Return True if a run is recorded as running, but its owner is gone."""
    return record.status == "RUNNING" and record.holder is None


def status_of(record: RunRecord) -> str:
    """Return the status of a run as people see it: INTERRUPTED where it is RUNNING and its owner is gone."""
    return "INTERRUPTED" if is_gone(record) else record.status


@dataclass(frozen=True, slots=True)
class History:
    """Reads one store. Every method raises StoreError.

    Attributes:
        redact: see RunConfig; applied to every state and every message before anybody sees it.
    """

    store: AsyncStates
    redact: Redact | None = None

    def run(self, run_id: str) -> RunRecord | None:
        """The last execution of a run, or None. Raises ValueError for an illegal id."""
        record = self.store.get_run(run_id)
        return None if record is None else self.shown_run(record)

    def page(self, query: RunQuery, limit: int, after: str | None = None) -> RunPage:
        """Some of the runs that are asked for; see run_page(). Statuses are those of :func:`status_of`.

        Raises ValueError for an ``after`` that is none.
        """
        wanted = query.statuses
        if "INTERRUPTED" in wanted:
            query = replace(query, statuses=(*wanted, "RUNNING"))
        page = self.store.run_page(query, limit=limit, after=after)
        found = [self.shown_run(record) for record in page.runs if not wanted or status_of(record) in wanted]
        if self.redact is not None and query.text is not None:
            # Or one could find out, guess by guess, what is hidden.
            part = query.text.lower()
            found = [
                r for r in found if any(part in t.lower() for t in (r.run_id, r.pipeline, r.error or ""))
            ]
        return RunPage(found, page.next)

    def runs(self, query: RunQuery, limit: int) -> list[RunRecord]:
        """As many of the runs that are asked for as there are, the one begun last first."""
        found: list[RunRecord] = []
        after = None
        while len(found) < limit:
            page = self.page(query, limit - len(found), after)
            found += page.runs
            after = page.next
            if after is None:
                break
        return found

    def attempt_page(self, run_id: str, limit: int, after: str | None = None) -> AttemptPage:
        """Some attempts of the last execution; see attempt_page() of the store."""
        page = self.store.attempt_page(run_id, limit=limit, after=after)
        return AttemptPage(self.shown_attempts(run_id, page.attempts), page.next)

    def attempts(self, run_id: str, most: int) -> tuple[list[AttemptRecord], bool]:
        """The first attempts of the last execution without their outputs, and whether there are more."""
        found: list[AttemptRecord] = []
        after = None
        while len(found) < most:
            page = self.attempt_page(run_id, min(most - len(found), 5000), after)
            found += page.attempts
            after = page.next
            if after is None:
                break
        return in_order(found), after is not None

    def attempts_at(self, run_id: str, position: int, branch: str = "") -> list[AttemptRecord]:
        """Every attempt of the last execution at one place, without outputs. [] if unknown."""
        return self.shown_attempts(run_id, self.store.attempts_at(run_id, position, branch))

    def waiting(self, run_id: str) -> list[Waiting]:
        """Return the questions of nodes in the last execution of a run, answered ones too; [] if unknown."""
        hide = _Hiding(self, run_id)
        found = self.store.waiting(run_id)
        return [one._replace(reason=hide(one.reason, one.position, one.branch) or "") for one in found]

    def shown_run(self, record: RunRecord) -> RunRecord:
        """A run with its messages as ``redact`` lets them be seen."""
        if self.redact is None or (record.error is None and record.cause is None):
            return record
        hide, cause = _Hiding(self, record.run_id), record.cause
        at = (0, "") if cause is None else (cause.position, cause.branch)
        if cause is not None:
            cause = cause._replace(message=hide(cause.message, *at), reason=hide.code(cause.reason, *at))
        return replace(record, error=hide(record.error, *at), cause=cause)

    def shown_attempts(self, run_id: str, attempts: list[AttemptRecord]) -> list[AttemptRecord]:
        """Attempts of one run with their messages as ``redact`` lets them be seen."""
        if self.redact is None:
            return attempts
        hide = _Hiding(self, run_id)
        return [
            one
            if one.message is None and one.reason is None
            else replace(
                one,
                message=hide(one.message, one.position, one.branch),
                reason=hide.code(one.reason, one.position, one.branch),
            )
            for one in attempts
        ]

    def output(
        self, run_id: str, position: int, branch: str = "", *, most_bytes: int | None = None
    ) -> Payload:
        """Return the committed output at a place, without its content above ``most_bytes``."""
        try:
            data = self.store.output_of(run_id, position, branch)
        except CorruptCheckpoint as error:
            return Payload(None, str(error))
        if data is None:
            return Payload(None, "nothing is committed here")
        return self._shown(data, most_bytes)

    def given_to(
        self,
        run_id: str,
        attempt: AttemptRecord,
        *,
        most_bytes: int | None = None,
        inputs: Inputs | None = None,
    ) -> Payload:
        """Return what an attempt was given: a child of a group what the group got, an item of a map that item of it.

        ``inputs``: those of other attempts of the run, which are read once.
        """
        return (inputs or Inputs(self, run_id)).of(attempt, most_bytes)

    def given(self, run_id: str, position: int, *, most_bytes: int | None = None) -> Payload:
        """Return the input of a position: the output before it, or the run's own input."""
        if position:
            found = self.output(run_id, position - 1, most_bytes=most_bytes)
            if found.problem == "nothing is committed here":
                return Payload(None, "the output before it is not in the store any more")
        else:
            try:
                found = self._shown(self.store.input_of(run_id), most_bytes)
            except (CorruptCheckpoint, CheckpointNotFound) as error:
                return Payload(None, str(error))
        return found

    def made(self, attempt: AttemptRecord) -> Payload:
        """The output that an attempt was read with."""
        if attempt.damaged:
            return Payload(None, "the output is damaged")
        return (
            Payload(None, "it committed nothing") if attempt.output is None else self._shown(attempt.output)
        )

    def _shown(self, data: bytes, most_bytes: int | None = None) -> Payload:
        found = _opened(data, most_bytes)
        return found if found.problem is not None else Payload(self.hide(found.value))

    def hide(self, value: Any) -> Any:
        """A state as ``redact`` lets it be seen; where that raises, a word in its place."""
        return value if self.redact is None else jsonable(hide_state(self.redact, value))

    def story(
        self,
        record: RunRecord,
        *,
        most: int = 5000,
        states: bool = True,
        mend: str = "",
        facts: Sequence[tuple[str, str]] = (),
    ) -> Story:
        """A run as it is drawn. ``states``: with the input and output of each attempt, as far as they are not too large."""
        attempts, more = self.attempts(record.run_id, most)
        inputs = Inputs(self, record.run_id, attempts)
        first = min((attempt.started_ns for attempt in attempts), default=0)
        bars = []
        room = _ALL_STATES
        for attempt in attempts:
            given = made = None
            if states:
                held = inputs.of(attempt, _ONE_STATE)
                given = held.value if held.problem is None else {"left out": held.problem}
                size = attempt.output_bytes
                if size is not None and size <= min(_ONE_STATE, room):
                    room -= size
                    made = self.output(record.run_id, attempt.position, attempt.branch).value
                elif size is not None:
                    made = {"left out": f"{size:,} bytes"}
            bars.append(bar_of(attempt, first, given, made))
        box = None
        if record.cause is not None and record.status not in FINISHED:
            cause = record.cause
            at = f"{cause.position}.{cause.branch}" if cause.branch else str(cause.position)
            message = cause.text or record.error or ""
            box = StopCause(
                cause.node_id, at, cause.attempt, cause.failure_class, message, cause.reason, mend
            )
        status = "INTERRUPTED" if is_gone(record) else record.status
        seconds = max(0, record.updated_ms - record.started_ms) / 1000
        return Story(
            record.run_id, record.pipeline, status, bars, record.tokens, record.cost_usd, record.started_ms, seconds, box,
            facts, 1 if more else 0,
        )  # fmt: skip


class Inputs:
    """The inputs of a run's attempts, as far as the store tells; each is read once.

    ``attempts``: some that are known already, so that their groups need not be looked up.
    """

    def __init__(self, history: History, run_id: str, attempts: Iterable[AttemptRecord] = ()) -> None:
        self._history = history
        self._run_id = run_id
        #: The id of the group around a place, where an attempt of the place is known.
        self._groups = {(one.position, one.branch): one.group_id for one in attempts}
        self._read: dict[tuple[int, str], Payload] = {}

    def of(self, attempt: AttemptRecord, most_bytes: int | None = None) -> Payload:
        """Return the input of an attempt. Above ``most_bytes`` it is not shown."""
        self._groups[attempt.position, attempt.branch] = attempt.group_id
        found = self._at(attempt.position, attempt.branch)
        if most_bytes is None or found.problem is not None:
            return found
        size = len(json.dumps(found.value))
        return found if size <= most_bytes else Payload(None, f"it has {size:,} bytes: too much to show here")

    def _at(self, position: int, branch: str) -> Payload:
        place = position, branch
        if place not in self._read:
            self._read[place] = self._find(position, branch)
        return self._read[place]

    def _find(self, position: int, branch: str) -> Payload:
        if not branch:
            return self._history.given(self._run_id, position, most_bytes=_ALL_STATES)
        outer, _, index = branch.rpartition(".")
        group = self._group_of(position, branch)
        if group is None:
            return Payload(
                None, "the group around it has not ended: which part of its input it got is not recorded yet"
            )
        around = self._at(position, outer)
        over = _MAP.match(group)
        if over is None or around.problem is not None:
            return around
        items = around.value.get(over[1]) if isinstance(around.value, dict) else None
        if not isinstance(items, list) or not index.isdecimal() or int(index) >= len(items):
            return Payload(None, f"it is an item of {over[1]}, which is not in the state")
        return Payload(items[int(index)])

    def _group_of(self, position: int, branch: str) -> str | None:
        place = position, branch
        if place not in self._groups:
            known = self._history.store.attempts_at(self._run_id, position, branch)
            self._groups[place] = known[-1].group_id if known else None
        return self._groups[place]


def _opened(data: bytes, most_bytes: int | None) -> Payload:
    """A state in its stored form, as plain data."""
    if most_bytes is not None and len(data) > most_bytes:
        return Payload(None, f"it has {len(data):,} bytes: too much to show here")
    try:
        return Payload(jsonable(Schema.decode_raw(data)))
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        return Payload(None, f"it cannot be read back: {type(error).__name__}: {error}")


class _Hiding:
    """Messages of one run without what ``redact`` takes out of the states around them.

    Those are the run's input, and the outputs of the place, of its group, and of the position before. Where one of them
    cannot be looked into, nobody knows what is hidden in it, and no message is shown.
    """

    def __init__(self, history: History, run_id: str) -> None:
        self._history = history
        self._run_id = run_id
        self._found: dict[tuple[int, str] | None, frozenset[str] | None] = {}

    def __call__(self, text: str | None, position: int, branch: str) -> str | None:
        redact = self._history.redact
        if redact is None or not text:
            return text
        hidden = self._around(position, branch)
        return HIDDEN if hidden is None else hide_words(redact, text, hidden)

    def code(self, text: str | None, position: int, branch: str) -> str | None:
        """A word for programs: what is not hidden of it stays as it is."""
        hidden = self._around(position, branch) if text and self._history.redact is not None else _NONE
        return HIDDEN if hidden is None else text and without(text, hidden)

    def _around(self, position: int, branch: str) -> frozenset[str] | None:
        hidden = _NONE
        for place in dict.fromkeys((None, (position - 1, ""), (position, ""), (position, branch))):
            if place not in self._found:
                self._found[place] = self._taken_out(place)
            found = self._found[place]
            if found is None:
                return None
            hidden |= found
        return hidden

    def _taken_out(self, place: tuple[int, str] | None) -> frozenset[str] | None:
        """Return the values that redaction removes from the input (None) or an output; None if unknown."""
        store = self._history.store
        if place is not None and place[0] < 0:
            return _NONE
        try:
            data = store.input_of(self._run_id) if place is None else store.output_of(self._run_id, *place)
        except CheckpointNotFound:
            return _NONE  # It was deleted meanwhile.
        except CorruptCheckpoint:
            return None
        if data is None:
            return _NONE
        held = _opened(data, _ONE_STATE)
        return (
            None
            if held.problem is not None
            else hidden_values([(held.value, self._history.hide(held.value))])
        )


def bar_of(attempt: AttemptRecord, first_ns: int, given: Any = None, made: Any = None) -> Bar:
    """An attempt as it is drawn; ``first_ns``: when the first one began."""
    return Bar(
        attempt.node_id, place_of(attempt), attempt.attempt, (attempt.started_ns - first_ns) / 1e6, attempt.duration_ms,
        attempt.outcome, attempt.failure_class, attempt.reason, attempt.text, attempt.tokens, attempt.output_tokens,
        attempt.cost_usd, attempt.model, attempt.output_bytes is not None, given, made,
        attempt.function_ms if 0 < attempt.function_ms <= attempt.duration_ms - 1 else None,
    )  # fmt: skip


# ---------------------------------------------------------------------- differences


class Change(NamedTuple):
    """One difference between two states. ``path``: "lines.0.price", "" for the whole. ``a``, ``b``: None where it is not there."""

    path: str
    kind: Literal["added", "removed", "changed"]
    a: Any
    b: Any


def changes(a: Any, b: Any, path: str = "") -> list[Change]:
    """Return the differences of two states of plain JSON data, field by field, at most a thousand."""
    found: list[Change] = []
    for change in _changes(a, b, path):
        found.append(change)
        if len(found) >= _MOST_CHANGES:
            break
    return found


def _changes(a: Any, b: Any, path: str) -> Iterator[Change]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            at = f"{path}.{key}" if path else str(key)
            if key not in b:
                yield Change(at, "removed", a[key], None)
            elif key not in a:
                yield Change(at, "added", None, b[key])
            else:
                yield from _changes(a[key], b[key], at)
    elif isinstance(a, list) and isinstance(b, list):
        for index in range(max(len(a), len(b))):
            at = f"{path}.{index}" if path else str(index)
            if index >= len(b):
                yield Change(at, "removed", a[index], None)
            elif index >= len(a):
                yield Change(at, "added", None, b[index])
            else:
                yield from _changes(a[index], b[index], at)
    elif json.dumps(a) != json.dumps(b):  # As text: 1, 1.0 and True are equal to Python alone.
        yield Change(path, "changed", a, b)


class NodeDiff(NamedTuple):
    """A node of two runs; ``a`` or ``b`` is None where only the other one has it.

    Attributes:
        a, b: the attempts at its place, the first one first.
        output: how what is committed differs.
        facts: what else does: outcome, class, attempts, model.
    """

    a: list[AttemptRecord] | None
    b: list[AttemptRecord] | None
    output: list[Change]
    facts: list[Change]

    @property
    def same(self) -> bool:
        return self.a is not None and self.b is not None and not self.output and not self.facts


def compare(
    a: Sequence[AttemptRecord], b: Sequence[AttemptRecord], read: Callable[[AttemptRecord], Payload]
) -> list[NodeDiff]:
    """Two runs node by node, in the order of the first; a node that was put in or left out moves none of the others.

    ``read``: the output of an attempt.
    """
    left, right = _by_place(a), _by_place(b)
    names = [[(found[0].node_id, found[0].branch) for found in side] for side in (left, right)]
    told: list[NodeDiff] = []
    for kind, a0, a1, b0, b1 in SequenceMatcher(None, names[0], names[1], autojunk=False).get_opcodes():
        if kind == "equal":
            told += [_node(x, y, read) for x, y in zip(left[a0:a1], right[b0:b1], strict=True)]
        else:
            told += [NodeDiff(found, None, [], []) for found in left[a0:a1]]
            told += [NodeDiff(None, found, [], []) for found in right[b0:b1]]
    return told


def _by_place(attempts: Sequence[AttemptRecord]) -> list[list[AttemptRecord]]:
    places: dict[tuple[int, str], list[AttemptRecord]] = {}
    for attempt in in_order(attempts):
        places.setdefault((attempt.position, attempt.branch), []).append(attempt)
    return list(places.values())


def _node(
    a: list[AttemptRecord], b: list[AttemptRecord], read: Callable[[AttemptRecord], Payload]
) -> NodeDiff:
    kept = [next((x for x in reversed(side) if x.output_bytes is not None), None) for side in (a, b)]
    output: list[Change] = []
    if kept[0] is not None and kept[1] is not None:
        x, y = read(kept[0]), read(kept[1])
        output = changes(
            x.value if x.problem is None else x.problem, y.value if y.problem is None else y.problem
        )
    said = [
        {
            "outcome": side[-1].outcome,
            "committed": one is not None,
            "class": side[-1].failure_class,
            "reason": side[-1].reason,
            "attempts": len(side),
            "model": side[-1].model,
        }
        for side, one in zip((a, b), kept, strict=True)
    ]
    return NodeDiff(a, b, output, changes(said[0], said[1]))
