"""crash_at: simulate the death of a process around a commit."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Literal, NamedTuple, NoReturn, Self, cast, get_args

from pydantic import BaseModel

from stroma.checkpoint import Fenced, Session, StepCall, Waiting
from stroma.checkpoint.entries import RunControl
from stroma.contracts.node import Group, Node
from stroma.contracts.schema import Schema
from stroma.engine.context import INTERCEPTORS, Call, Interceptor, ReliabilityContext
from stroma.engine.execution import CURRENT, RunningNode
from stroma.hooks.dispatch import Hooks
from stroma.hooks.sets import NodeHooks
from stroma.trace.events import AttemptRow, place_text
from stroma.trace.result import ExecutionResult

Point = Literal["before_node", "after_node", "after_commit", "after_hooks", "before_end", "after_end"]
POINTS: Final[tuple[Point, ...]] = get_args(Point)
_WORDS: Final = {
    "before_node": "before {} was called",
    "after_node": "after {} had run, before its commit",
    "after_commit": "after the commit of {}, before its hooks",
    "after_hooks": "after the hooks of {}",
    "before_end": "before the end of the run was stored",
    "after_end": "after the end of the run was stored",
}


class Boundary(NamedTuple):
    """A moment at which a process may die. ``node_id`` is "" and ``position`` -1 at the end of a run.

    ``attempt``: 1-based, 0 at the end of a run.
    """

    point: Point
    node_id: str = ""
    position: int = -1
    branch: str = ""
    attempt: int = 0

    def __str__(self) -> str:
        at = place_text(self.position, self.branch)
        return _WORDS[self.point].format(f"node {self.node_id!r} (position {at}, attempt {self.attempt})")


class Crashed(BaseException):
    """Simulated death of a process; ``boundary`` says where.

    Where: out of ``run()`` and ``execute_step()`` inside of ``crash_at``, which ends it.
    Cause: the run reached the selected boundary.
    Fix: nothing; resume the run after the block, as the next process would.
    """

    def __init__(self, boundary: Boundary) -> None:
        super().__init__(f"the process died {boundary}")
        self.boundary = boundary


class _ProcessDied(Fenced):
    """Raised in the engine after a simulated death: nothing more is stored."""


@dataclass(slots=True)
class Life:
    """Record of one process: what it did with a run until it died or the run ended."""

    boundaries: list[Boundary] = field(default_factory=list)
    #: (position, branch) of each commit.
    committed: list[tuple[int, str]] = field(default_factory=list)
    died: Boundary | None = None
    failure: str | None = None


class Deaths(Interceptor):
    """Interceptor that ends the process at the first boundary that ``at`` selects.

    In this process that means: no node or hook is called any more, nothing is stored, and the lease is
    released. ``kill``: send SIGKILL to this process. ``report``: called at each boundary and commit, before
    the death.
    """

    def __init__(
        self,
        at: Callable[[Boundary], bool],
        *,
        life: Life | None = None,
        kill: bool = False,
        report: Callable[[str, Any], None] = lambda what, of: None,
    ) -> None:
        self._at = at
        self._kill = kill
        self._report = report
        self.life = life or Life()
        self._dead: set[ReliabilityContext] = set()

    def reach(self, ctx: ReliabilityContext, boundary: Boundary) -> bool:
        """Return True if the process is dead after this boundary."""
        if ctx in self._dead:
            return True
        self.life.boundaries.append(boundary)
        self._report("seen", boundary)
        if self.life.died is None and self._at(boundary):
            self.life.died = boundary
            if self._kill:
                os.kill(os.getpid(), signal.SIGKILL)
            self._dead.add(ctx)
            ctx.fire = Hooks(
                (), run_id=ctx.run_id, limit_seconds=None, failures=[], interceptors=ctx.fire.interceptors
            )
            ctx.session.abandon()
            return True
        return False

    def refuse(self) -> _ProcessDied:
        return _ProcessDied(f"the process died {self.life.died}")

    def commits(self, row: AttemptRow) -> None:
        self.life.committed.append((row.position, row.branch))
        self._report("committed", self.life.committed[-1])

    # ------------------------------------------------------------------ as an interceptor

    def begins(self, ctx: ReliabilityContext) -> NodeHooks | None:
        async def hook(run_id: str, node_id: str, *_: Any) -> None:
            run = CURRENT.get()
            if run is not None:
                self.reach(ctx, _at("after_hooks", run))

        return NodeHooks(on_node_success=hook, on_node_failure=hook, on_node_suspended=hook)

    def opened(self, ctx: ReliabilityContext, session: Session) -> Session:
        return cast("Session", _MortalSession(self, ctx, session))

    async def call(self, run: RunningNode, node: Node | Group, call: Call, state: BaseModel) -> Any:
        if self.reach(run.ctx, _at("before_node", run)):
            raise self.refuse()
        try:
            output = await call(state)
        except Exception:
            if self.reach(run.ctx, _at("after_node", run)):
                raise self.refuse() from None
            raise
        if self.reach(run.ctx, _at("after_node", run)):
            raise self.refuse()
        return output

    def ended(self, ctx: ReliabilityContext, result: ExecutionResult) -> None:
        self.life.failure = None if result.failure is None else str(result.failure)
        if ctx in self._dead:
            assert self.life.died is not None
            raise Crashed(self.life.died)


def _at(point: Point, run: RunningNode) -> Boundary:
    return Boundary(point, run.node_id, run.position, run.branch, run.attempt)


#: Methods of a session that do nothing after a simulated death, and those that end what calls them.
_DROPPED: Final = frozenset({"append_events", "delivered", "mark_effect", "note", "note_attribution"})
_REFUSED: Final = frozenset({"ask", "flush"})


class _MortalSession:
    """Session that stores nothing after the simulated death of its process."""

    def __init__(self, deaths: Deaths, ctx: ReliabilityContext, session: Session) -> None:
        self._deaths, self._ctx, self._session = deaths, ctx, session

    def __getattr__(self, name: str) -> Any:
        if name in _DROPPED and self._is_dead:
            return lambda *_: None
        if name in _REFUSED and self._is_dead:
            return self._refuse
        return getattr(self._session, name)

    def _refuse(self, *_: object) -> NoReturn:
        raise self._deaths.refuse()

    @property
    def on_control(self) -> Callable[[RunControl], None] | None:
        return self._session.on_control

    @on_control.setter
    def on_control(self, call: Callable[[RunControl], None] | None) -> None:
        self._session.on_control = call

    @property
    def _is_dead(self) -> bool:
        return self._ctx in self._deaths._dead

    def record(
        self, row: AttemptRow, schema: Schema | None, output: BaseModel | None, call: StepCall | None = None
    ) -> Awaitable[None] | None:
        if self._is_dead:
            raise self._deaths.refuse()
        pending = self._session.record(row, schema, output, call)
        return self._then(pending, row, committed=output is not None)

    def suspend(self, row: AttemptRow, waiting: Waiting) -> Awaitable[None] | None:
        if self._is_dead:
            raise self._deaths.refuse()
        return self._then(self._session.suspend(row, waiting), row, committed=False)

    def _then(
        self, pending: Awaitable[None] | None, row: AttemptRow, *, committed: bool
    ) -> Awaitable[None] | None:
        def reach_commit() -> None:
            if committed:
                self._deaths.commits(row)
            boundary = Boundary("after_commit", row.node_id, row.position, row.branch, row.attempt)
            if self._deaths.reach(self._ctx, boundary):
                raise self._deaths.refuse()

        async def later(pending: Awaitable[None]) -> None:
            await pending
            reach_commit()

        if pending is not None:
            return later(pending)
        reach_commit()
        return None

    def end(self, *end: Any) -> Awaitable[None] | None:
        if self._is_dead or self._deaths.reach(self._ctx, Boundary("before_end")):
            return None

        async def later(pending: Awaitable[None]) -> None:
            await pending
            self._deaths.reach(self._ctx, Boundary("after_end"))

        pending = self._session.end(*end)
        if pending is not None:
            return later(pending)
        self._deaths.reach(self._ctx, Boundary("after_end"))
        return None


class crash_at:
    """Context manager in which the process dies when a run reaches a point.

    ```python
    with crash_at("after_node", "draft"):
        await runner.run(pipeline, state, run_id="r")
    result = await runner.run(pipeline, state, run_id="r", resume=True)
    ```

    ``point`` is one of :data:`POINTS`: "before_node" (its function is about to be called; the intent of an
    effect is stored), "after_node" (it has returned or raised, and nothing is stored), "after_commit" (the
    store has the attempt, and no hook was called), "after_hooks", "before_end" and "after_end" (of the run).
    ``node``, ``attempt`` and ``branch`` select one; the first one by default.

    The death is simulated: the run raises Crashed, which this block catches, and code that runs beside the
    node is cancelled, so that its ``finally`` blocks run; memory stays as it is. With ``kill=True`` the
    process gets a SIGKILL: use that in a child process.

    Raises AssertionError if no run reaches the point, ValueError for an unknown point.
    """

    def __init__(
        self,
        point: Point,
        node: str | None = None,
        *,
        attempt: int | None = None,
        branch: str | None = None,
        kill: bool = False,
    ) -> None:
        if point not in POINTS:
            raise ValueError(f"{point!r} is not a point of a run; pass one of {', '.join(map(repr, POINTS))}")
        if node is not None and point.endswith("_end"):
            raise ValueError(f"{point!r} is the end of the run, not of node {node!r}; remove the node")
        expected = (node, attempt, branch)

        def is_it(boundary: Boundary) -> bool:
            actual = (boundary.node_id, boundary.attempt, boundary.branch)
            return boundary.point == point and all(
                w in (None, f) for w, f in zip(expected, actual, strict=True)
            )

        self._what = f"{point!r}" + ("" if node is None else f" of node {node!r}")
        self._deaths = Deaths(is_it, kill=kill)

    @property
    def boundary(self) -> Boundary | None:
        """Boundary at which the process died; None before."""
        return self._deaths.life.died

    def __enter__(self) -> Self:
        INTERCEPTORS.insert(0, self._deaths)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        INTERCEPTORS.remove(self._deaths)
        if kind is not None:
            return issubclass(kind, Crashed)
        if self.boundary is None:
            life = self._deaths.life
            ran = ", ".join(dict.fromkeys(repr(one.node_id) for one in life.boundaries if one.node_id))
            why = "" if life.failure is None else f"; the last run failed: {life.failure}"
            raise AssertionError(f"no run reached {self._what}; the nodes that ran are {ran or 'none'}{why}")
        return False
