"""Differences between two states, and between two runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any, Final, Literal, NamedTuple

from stroma._utils.text import clean
from stroma.checkpoint.history.bars import in_order
from stroma.checkpoint.history.redaction import Payload
from stroma.checkpoint.records import AttemptRecord

_MAX_CHANGES: Final = 1000
_SHARED_CHARACTERS: Final = 40  # of the beginning that two values share, to be shown


class Change(NamedTuple):
    """One difference between two states.

    Attributes:
        path: such as "lines.0.price"; "" for the whole state.
        a, b: the value in each state; None where it is missing.
    """

    path: str
    kind: Literal["added", "removed", "changed"]
    a: Any
    b: Any

    def texts(self, most: int = 200) -> tuple[str, str]:
        """Return both values as JSON of so many characters; of a change from shortly before they differ."""
        a, b = (json.dumps(value, ensure_ascii=False) for value in (self.a, self.b))
        first = next((at for at, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), 0)
        begin = max(0, first - _SHARED_CHARACTERS) if self.kind == "changed" else 0
        mark = "…" if begin else ""
        return mark + clean(a[begin:], most), mark + clean(b[begin:], most)


def changes(a: Any, b: Any, path: str = "") -> list[Change]:
    """Return the differences between two states of plain JSON data, field by field, at most a thousand."""
    return list(itertools.islice(_changes(a, b, path), _MAX_CHANGES))


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
    elif json.dumps(a) != json.dumps(b):  # As text: Python considers 1, 1.0 and True equal.
        yield Change(path, "changed", a, b)


class NodeDiff(NamedTuple):
    """A node of two runs; ``a`` or ``b`` is None if only the other run has it.

    Attributes:
        a, b: the attempts at its place, the first one first.
        output: differences between the committed outputs.
        facts: all other differences: outcome, class, attempts, model.
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
    """Compare two runs node by node, in the order of the first. Inserted and removed nodes shift no others.

    ``read``: returns the output of an attempt.
    """
    left, right = _group_by_place(a), _group_by_place(b)
    names = [[(place[0].node_id, place[0].branch) for place in side] for side in (left, right)]
    diffs: list[NodeDiff] = []
    for kind, a0, a1, b0, b1 in SequenceMatcher(None, names[0], names[1], autojunk=False).get_opcodes():
        if kind == "equal":
            diffs += [_compare_node(x, y, read) for x, y in zip(left[a0:a1], right[b0:b1], strict=True)]
        else:
            diffs += [NodeDiff(place, None, [], []) for place in left[a0:a1]]
            diffs += [NodeDiff(None, place, [], []) for place in right[b0:b1]]
    return diffs


def _group_by_place(attempts: Sequence[AttemptRecord]) -> list[list[AttemptRecord]]:
    places: dict[tuple[int, str], list[AttemptRecord]] = {}
    for attempt in in_order(attempts):
        places.setdefault((attempt.position, attempt.branch), []).append(attempt)
    return list(places.values())


def _compare_node(
    a: list[AttemptRecord], b: list[AttemptRecord], read: Callable[[AttemptRecord], Payload]
) -> NodeDiff:
    commits = [next((x for x in reversed(side) if x.output_bytes is not None), None) for side in (a, b)]
    output: list[Change] = []
    if commits[0] is not None and commits[1] is not None:
        output = changes(read(commits[0]).shown, read(commits[1]).shown)
    facts = [
        {
            "outcome": side[-1].outcome,
            "committed": commit is not None,
            "class": side[-1].failure_class,
            "reason": side[-1].reason,
            "attempts": len(side),
            "model": side[-1].model,
        }
        for side, commit in zip((a, b), commits, strict=True)
    ]
    return NodeDiff(a, b, output, changes(facts[0], facts[1]))
