"""Identities of steps that code calls. They do not depend on the order in which concurrent calls happen.

A node of a pipeline has a position, and a child of a group a branch. A step that is called (by
``execute_step`` or by the guard of an adapter) is identified by its scope, its id and a number:

* scope: the asyncio task that makes the call. Tasks are numbered by their first call, inside the scope that
  started them, so that concurrent calls have the same identities whichever is faster.
* number: 0-based number of the call of that id in that scope.

Under a node, the identity is the last part of the step's branch; the other parts are indexes of children,
which are digits.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import re
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Final, NamedTuple
from urllib.parse import quote

_MARK: Final = "#"  # in each identity, and nowhere else in a branch


def idempotency_key(run_id: str, execution: int, at: int | str, branch: str) -> str:
    """Return the key of a call: 32 digits and letters, which any header, URL and provider takes.

    ``at``: the position, or the identity of a step that plain code calls.
    """
    call = f"{run_id}:{execution}:{at}:{branch}"  # Read from its end, it has one meaning.
    return hashlib.sha256(call.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Identity(NamedTuple):
    """A call of a step.

    Attributes:
        text: unique under the node around the call, or in the plain code of a run.
        number: 0-based number of the call of its id in its scope.
        path: the scope; "" for the first task that called a step.
    """

    text: str
    number: int
    path: str = ""


class Scope:
    """Counts the calls that one task makes."""

    __slots__ = ("counts", "of", "owner", "path", "tasks")

    def __init__(self, of: object, owner: weakref.ref[asyncio.Task[Any]] | None, path: str) -> None:
        #: Mark of its StepCalls; not the object itself, which references its first scope: no reference cycle.
        self.of = of
        #: Weak: the task references its context, which references the scope.
        self.owner = owner
        self.path = path
        self.counts: Counter[str] = Counter()
        self.tasks = itertools.count()

    def is_of(self, task: asyncio.Task[Any] | None) -> bool:
        return (None if self.owner is None else self.owner()) is task


SCOPE: ContextVar[Scope | None] = ContextVar("stroma_scope", default=None)


class StepCalls:
    """Numbers the steps that are called under one attempt of a node, or by the plain code of one run."""

    __slots__ = ("_counts", "_mark", "_root", "_tasks", "attempt")

    def __init__(self, attempt: int = 0) -> None:
        self.attempt = attempt
        self._mark = object()
        self._root: Scope | None = None
        self._tasks = itertools.count(1)
        self._counts: Counter[tuple[str, str]] = Counter()

    def scope(self) -> Scope:
        """Return the scope of the running task, and make it the outer scope of tasks that it starts."""
        task = asyncio.current_task()
        scope, root = SCOPE.get(), self._root
        if scope is None or scope.of is not self._mark:
            if root is not None and root.is_of(task):
                scope = root
            else:
                scope = Scope(self._mark, _weak(task), "" if root is None else str(next(self._tasks)))
                self._root = root or scope
        elif not scope.is_of(task):
            scope = Scope(self._mark, _weak(task), f"{scope.path}-{next(scope.tasks)}")
        SCOPE.set(scope)
        return scope

    def next(self, scope: Scope, step_id: str, kind: str = "") -> Identity:
        """Return the identity of the next call of a step in a scope. ``kind`` sets other calls apart."""
        name = f"{kind}{quoted(step_id)}"
        number = scope.counts[name]
        scope.counts[name] = number + 1
        text = f"{name}{_MARK}{number}"
        return Identity(f"{scope.path}/{text}" if scope.path else text, number, scope.path)

    def named(self, key: str, kind: str = "") -> str:
        """Return the identity of a call that has a name, whichever task makes it."""
        return f"{kind}{_MARK}{quoted(key)}"

    def next_of_input(self, step_id: str, digest: str) -> Identity:
        """Return the identity of the next call of a step with an input, in any task or thread.

        For frameworks that skip finished calls themselves: their second call may not be the second one of the
        run.
        """
        number = self._counts[step_id, digest]
        self._counts[step_id, digest] += 1
        return Identity(f"{quoted(step_id)}{_MARK}{number}@{digest}", number)


def _weak(task: asyncio.Task[Any] | None) -> weakref.ref[asyncio.Task[Any]] | None:
    return None if task is None else weakref.ref(task)


@lru_cache(maxsize=1024)
def quoted(step_id: str) -> str:
    """Return an id as it stands in identities."""
    # Branches are split at dots, which quote() leaves alone. It escapes "/" and "#", which identities use.
    return quote(step_id, safe="", errors="backslashreplace").replace(".", "%2E")


def is_called(branch: str) -> bool:
    """Return True if a branch belongs to a step that code calls, or to something inside one."""
    return _MARK in branch


#: The numbers of attempts in a part of a branch.
_ATTEMPTS: Final = re.compile(r"(^|\.)[0-9-]+:")


def without_attempts(branch: str) -> str:
    """Return the branch that a step has in the first attempts of the nodes around it."""
    return _ATTEMPTS.sub(r"\1", branch)


def has_input(branch: str) -> bool:
    """Return True if a branch names the input of its step: see :meth:`StepCalls.next_of_input`."""
    return bool(branch.rpartition(".")[2].partition("@")[2])


def sequence_id(node_ids: Iterable[str]) -> str:
    """Return the id of a group whose children run in turn, each on the output of the one before it."""
    return f"[{', '.join(node_ids)}]"


def place_before(branch: str, group_id: str | None) -> str | None:
    """Return the branch whose output is the input of a child of a sequence; None for the first child."""
    outer, dot, index = branch.rpartition(".")
    if group_id is None or not group_id.startswith("[") or not index.isdecimal() or int(index) == 0:
        return None
    return f"{outer}{dot}{int(index) - 1}"


def with_outer(branch: str) -> Iterator[str]:
    """Yield a branch and those around it, the innermost first."""
    while branch:
        yield branch
        branch = branch.rpartition(".")[0]


def child_indexes(branch: str) -> list[int]:
    """Return the index of each child on the way to a branch, up to the first step that code calls."""
    return [int(part) for part in itertools.takewhile(str.isdecimal, branch.split("."))]


def mark_of(*place: int | str) -> str:
    """Return a place in a list, numbers and perhaps a text after them, as the ``next`` of a page."""
    return ":".join(map(str, place))


def parse_mark(mark: str, numbers: int, *, has_text: bool = False) -> tuple[Any, ...]:
    """Return the place in the ``next`` of a page. Raises ValueError for any other text."""
    place = mark.split(":", numbers)
    for one in place[:numbers]:
        if len(place) != numbers + has_text or not (one.isdecimal() and one.isascii() and len(one) < 20):
            raise ValueError(f"after must be the `next` of a page, got {mark[:100]!r}")
    return (*map(int, place[:numbers]), *place[numbers:])
