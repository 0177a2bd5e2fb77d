"""The items of a map on their way through the engine: so many at once, each once, however many there are."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from functools import partial
from time import monotonic, perf_counter_ns
from typing import Any, Final, cast

from pydantic import BaseModel

from stroma._utils.text import one_line
from stroma.checkpoint import Committed, PipelineChanged, StepCall, inside_of
from stroma.checkpoint.protocols import OF_MAP
from stroma.contracts.contract import ContractViolation
from stroma.contracts.node import Group, Node
from stroma.contracts.schema import schema_of
from stroma.engine.commit import failed_of, record, settle
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import NodeExecution
from stroma.engine.loop import execute
from stroma.engine.outcome import GroupStopped, Halt, Place
from stroma.engine.restore import check_committed, output_schema, read_output, value_of
from stroma.failures.classes import FailureClass
from stroma.failures.errors import ItemFailure
from stroma.failures.failure import Failure, text_of
from stroma.hooks.sets import MapProgress
from stroma.runner.items import Item, LinesFile, Source
from stroma.trace.events import AttemptRow, BoundedRows, Outcome

__all__ = ["DEFAULT_CONCURRENCY", "MapRun", "branches_in"]

#: How many items run at once where they could be endless and nobody says.
DEFAULT_CONCURRENCY: Final = 64
_KEPT_EVENTS: Final = (
    1000  # of a map that keeps no outputs: that many events, and that many failures after those
)
_PAGE: Final = 200  # items that are looked up in the journal at once
_PROGRESS_SECONDS: Final = 0.2
_RATE_SECONDS: Final = 15  # over which a rate is told


class MapRun:
    """One attempt of a map.

    Attributes:
        outputs: by index; None where they stay in the journal.
        failures: of the items that failed while the others went on.
    """

    def __init__(
        self,
        ctx: ReliabilityContext,
        group: NodeExecution,
        child: Node | Group,
        source: Source,
        state_of: Callable[[Any], BaseModel],
        *,
        limit: int | None,
        collect: bool,
        keep: bool,
    ) -> None:
        self._ctx = ctx
        self._group = group
        self._child = child
        self._source = source
        self._state_of = state_of
        self._collect = collect
        self._prefix = f"{group.branch}." if group.branch else ""
        self._inside = branches_in(child)
        self._inside_step = inside_of(group.step)
        self._crew = _Crew(limit)
        self._stopped: Halt | None = None
        self._waiting: Halt | None = None
        self._progress = _Progress(ctx, group, source)
        #: Whether there may be items that are done already.
        self._again = ctx.session.continued or group.attempt > 1
        self.outputs: dict[int, BaseModel] | None = {} if keep else None
        self.failures: list[ItemFailure] = []
        self.count = 0
        if not keep:
            group.children = BoundedRows(_KEPT_EVENTS)
            group.remembers = False
        if self._again and ctx.restored is ctx.session.restored:
            ctx.restored = dict(ctx.restored)  # Ours to change.

    async def go(self) -> None:
        """Run all items. Raises GroupStopped for the first that stopped for good, its siblings awaited."""
        if self.outputs is None:
            await self._read([])  # A store that cannot do that says so before anything is called.
        await self._source.prepare()
        if self._again:
            await self._look_at_first()
        await self._progress.tell()
        try:
            await self._all_items()
        except Exception:
            await self._progress.end()
            raise
        await self._progress.end()
        self._ctx.failed_items += self._progress.failed
        if (self.outputs is None or self._progress.failed) and self._group.step is None:
            # With the commit of the group: what a later process must know of it.
            self._group.step = StepCall(self._progress.failed, OF_MAP + str(self.count).encode())

    async def _all_items(self) -> None:
        await self._crew.all(self._feed())
        for halt in (self._stopped, self._waiting):
            if halt is not None:
                raise GroupStopped(halt)
        if self._ctx.interrupt is not None and self.count != self._progress.done:
            self._ctx.interrupt()
            await asyncio.Event().wait()  # Until that arrives.

    # ------------------------------------------------------------------ feeding

    @property
    def _over(self) -> bool:
        return self._stopped is not None or self._ctx.interrupt is not None

    async def _feed(self) -> None:
        async with contextlib.aclosing(self._source.pages()) as pages:
            async for page in pages:
                found = await self._committed(page) if self._again else {}
                for item in page:
                    self.count = item.index + 1
                    if item.index in found:
                        await self._restore(item, found[item.index])
                        continue
                    await self._crew.room()
                    if self._over:
                        return
                    await self._begin(item)
                if self._again and self._source.page < _PAGE:
                    self._source.page = min(_PAGE, 2 * self._source.page) if len(found) == len(page) else 1
        if self._again and self.outputs is None and await self._look(range(self.count, self.count + 1)):
            raise self._changed(f"there are only {self.count} items where there were more")

    async def _begin(self, item: Item) -> None:
        if item.broken is None:
            try:
                value = self._state_of(item.value)
            except Exception as error:  # A class of the user's that cannot be made.
                await self._refuse(item, f"{type(error).__name__}: {error}")
                return
            self._crew.start(self._one(item, value))
        else:
            await self._refuse(item, item.broken)

    async def _refuse(self, item: Item, why: str) -> None:
        """An item that is none: nothing can be called with it."""
        raw = {"item": item.index, "value": item.value}
        violation = ContractViolation(
            self._child.node_id, "input", raw, [{"type": "item", "loc": (), "msg": why, "input": item.value}]
        )
        failure = Failure(violation, FailureClass.TERMINAL, self._child.node_id, 0, str(violation))
        await self._failed(item, Halt(failure))

    # ------------------------------------------------------------------ items

    def _branch(self, index: int) -> str:
        return f"{self._prefix}{index}"

    def _call_of(self, item: Item) -> StepCall | None:
        return self._inside_step if item.made_of is None else StepCall(0, item.made_of)

    async def _one(self, item: Item, value: BaseModel) -> None:
        if self._stopped is not None:
            return
        outcome = await self._execute(item, value)
        if self.outputs is None:
            self._forget(item.index)
        if isinstance(outcome, Halt):
            await self._failed(item, outcome)
            return
        if self.outputs is not None:
            self.outputs[item.index] = outcome
        await self._progress.one()

    async def _execute(self, item: Item, value: BaseModel) -> BaseModel | Halt:
        group = self._group
        place = Place(group.position, self._branch(item.index), "item", group, step=self._call_of(item))
        return await execute(self._ctx, self._child, value, place)

    async def _failed(self, item: Item, halt: Halt) -> None:
        if halt.suspended:  # Its siblings need not wait: all that can be done is done.
            self._waiting = self._waiting or halt
            return
        if self._collect and not halt.spent and not halt.partial and not self._ctx.cancelled:
            await self._keep_failure(item, halt.failure)
            return
        self._stopped = self._stopped or halt
        # A crossed limit cancels nobody: siblings in flight were paid for, they finish, and nothing new is called.
        if not self._stopped.spent:
            raise GroupStopped(halt)

    async def _keep_failure(self, item: Item, failure: Failure) -> None:
        """Commit that an item has failed, in the place of its output: a resume does not run it again by itself."""
        ctx, group = self._ctx, self._group
        kept = ItemFailure(
            index=item.index,
            node_id=failure.node_id,
            failure_class=failure.failure_class,
            message=failure.message,
            reason=failure.reason,
            attempts=failure.attempt,
        )
        row = AttemptRow(
            self._child.node_id, failure.attempt + 1, perf_counter_ns() + ctx.epoch_ns, 0, {}, None,
            cast("Outcome", "collected"), failed_of(failure), None,
            group.position, self._branch(item.index), group.node_id, None, None, 0,
        )  # fmt: skip
        call = self._call_of(item)
        schema = schema_of(ItemFailure)
        again = partial(record, ctx, row, schema, kept, call)
        pending = again()
        if pending is not None:
            problem, cancelled = await settle(ctx, row, pending, again)
            if problem is not None:
                stored = Failure(
                    problem,
                    FailureClass.RECOVERABLE,
                    self._child.node_id,
                    failure.attempt,
                    str(problem),
                    "store",
                )
                self._stopped = self._stopped or Halt(stored, partial=True)
                raise GroupStopped(self._stopped)
            if cancelled:
                raise asyncio.CancelledError
        if ctx.delivers:
            ctx.session.delivered(row)
        # The message stood in the log when the attempt failed; here nobody could tell what redact hides in it.
        why = one_line(text_of(failure)) if ctx.config.redact is None else failure.failure_class
        ctx.run_logger.info("item %d of %r is left out: %s", item.index, group.node_id, why)
        await self._note_failure(kept)

    async def _note_failure(self, kept: ItemFailure, *, restored: bool = False) -> None:
        if self.outputs is not None:
            self.failures.append(kept)
        await self._progress.one(failed=True, restored=restored)

    # ------------------------------------------------------------------ what is done already

    async def _restore(self, item: Item, committed: Committed) -> None:
        """An item that an earlier process, or attempt of the group, has done."""
        ctx = self._ctx
        at = (self._group.position, self._branch(item.index))
        if committed.is_failed_item:
            kept = read_output(schema_of(ItemFailure), committed, None)
            await self._note_failure(cast("ItemFailure", kept), restored=True)
        elif self.outputs is None and isinstance(self._child, Node) and ctx.fire.on_node_skipped is None:
            # Nobody wants to see it, and it is read when the outputs are: that it is the right one is all that matters.
            schema = output_schema(ctx, self._child, None)
            check_committed(ctx, self._child, schema, committed, *at, self._group.node_id)
            await self._progress.one(restored=True)
        elif item.broken is None:
            cast("dict[Any, Any]", ctx.restored)[at] = committed
            outcome = await self._execute(item, self._state_of(item.value))
            if isinstance(outcome, Halt):  # A group of another schema, which is put together anew.
                await self._failed(item, outcome)
                return
            if self.outputs is not None:
                self.outputs[item.index] = outcome
            await self._progress.one(restored=True)
        if self.outputs is None:
            cast("dict[Any, Any]", ctx.restored).pop(at, None)

    async def _committed(self, page: Sequence[Item]) -> dict[int, Committed]:
        """Those of some items that are done, unless they are to be run again. Raises PipelineChanged."""
        ctx, position = self._ctx, self._group.position
        if self.outputs is None:
            found = await self._look([item.index for item in page])
        else:
            found = {
                item.index: ctx.restored[position, self._branch(item.index)]
                for item in page
                if (position, self._branch(item.index)) in ctx.restored
            }
        for item in page:
            committed = found.get(item.index)
            if committed is None:
                continue
            self._compare(item.index, item.made_of, committed)
            if committed.is_failed_item and (not self._collect or ctx.config.retry_failed_items):
                del found[item.index]
                cast("dict[Any, Any]", ctx.restored).pop((position, self._branch(item.index)), None)
        return found

    async def _look(self, indexes: Sequence[int]) -> dict[int, Committed]:
        """What the journal has of some items; what it has of the nodes inside them is restored from there."""
        ctx, position = self._ctx, self._group.position
        branches = {self._branch(index): index for index in indexes}
        found = await self._read(list(branches))
        inside = [f"{branch}.{rest}" for branch in branches if branch not in found for rest in self._inside]
        if inside:
            for branch, committed in (await self._read(inside)).items():
                cast("dict[Any, Any]", ctx.restored)[position, branch] = committed
        return {branches[branch]: committed for branch, committed in found.items()}

    async def _read(self, branches: Sequence[str]) -> Mapping[str, Committed]:
        committed = self._ctx.session.committed(self._group.position, branches)
        return committed if isinstance(committed, Mapping) else await committed

    def _forget(self, index: int) -> None:
        if self._again and self._inside:
            for rest in self._inside:
                at = (self._group.position, f"{self._branch(index)}.{rest}")
                cast("dict[Any, Any]", self._ctx.restored).pop(at, None)

    async def _look_at_first(self) -> None:
        """Refuse a source as a whole that is not what it was, before anything is called."""
        total = self._source.total
        if total is None or self.outputs is not None:
            return
        async with contextlib.aclosing(self._source.pages()) as pages:
            first: Sequence[Item] = await anext(pages, ())
        wanted = first[0].made_of if first else None
        if wanted is None or not wanted.startswith(b"item of "):
            return
        for start in range(0, total, _PAGE):
            found = await self._look(range(start, min(total, start + _PAGE)))
            if found:
                index = min(found)
                self._compare(index, wanted, found[index])
                return

    def _compare(self, index: int, made_of: bytes | None, committed: Committed) -> None:
        then = None if committed.step is None else committed.step.given
        if then is not None and made_of is not None and then != made_of:
            raise self._changed(self._source.changed(index))

    def _changed(self, what: str) -> PipelineChanged:
        return PipelineChanged(
            f"run {self._ctx.run_id!r} cannot go on with {self._group.node_id!r}: {what}; restore it, or begin a new run"
        )

    # ------------------------------------------------------------------ outputs

    async def write(self, file: LinesFile, failures: LinesFile | None = None) -> None:
        """Make files of the outputs and of the failures out of the journal, in the order of the items."""
        files = [found for found in (file, failures) if found is not None]
        try:
            for one in files:
                await asyncio.to_thread(one.begin)
            for first in range(0, self.count, _PAGE):
                outputs: list[Any] = []
                failed: list[Any] = []
                async for _, value in self._values(range(first, min(self.count, first + _PAGE))):
                    (failed if isinstance(value, ItemFailure) else outputs).append(value)
                await asyncio.to_thread(file.write, outputs)
                if failures is not None and failed:
                    await asyncio.to_thread(failures.write, failed)
            for one in reversed(files):
                await asyncio.to_thread(one.finish)
        except BaseException:
            for one in files:
                one.give_up()
            raise

    async def _values(self, indexes: range) -> AsyncIterator[tuple[int, Any]]:
        found = await self._read([self._branch(index) for index in indexes])
        for index in indexes:
            committed = found.get(self._branch(index))
            if committed is None:
                raise PipelineChanged(
                    f"item {index} of {self._group.node_id!r} in run {self._ctx.run_id!r} is not in the journal any more; "
                    "begin a new run"
                )
            yield index, value_of(self._ctx.registry, self._child, committed)


def branches_in(node: Node | Group) -> list[str]:
    """The branches below a node that are known before it runs."""
    if isinstance(node, Node) or node.each:
        return []
    return [
        branch
        for index, child in enumerate(node.children)
        for branch in (str(index), *(f"{index}.{rest}" for rest in branches_in(child)))
    ]


class _Progress:
    """How far a map is, told to who wants to know."""

    def __init__(self, ctx: ReliabilityContext, group: NodeExecution, source: Source) -> None:
        self._ctx = ctx
        self._group = group
        self._source = source
        self._calls = ctx.fire.on_map_progress
        self._begun = self._told = monotonic()
        self._telling = False
        #: (when, how many this process had done) at the last tellings.
        self._marks: deque[tuple[float, int]] = deque([(self._begun, 0)])
        self.done = self.failed = self.restored = 0
        self.ended = False

    async def one(self, *, failed: bool = False, restored: bool = False) -> None:
        """An item has ended."""
        self.done += 1
        self.failed += failed
        self.restored += restored
        if self._calls is not None and not self._telling and monotonic() - self._told >= _PROGRESS_SECONDS:
            await self.tell()

    async def end(self) -> None:
        """The last word."""
        self.ended = True
        await self.tell()

    async def tell(self) -> None:
        calls = self._calls
        if calls is None:
            return
        self._telling = True
        try:
            now = self._told = monotonic()
            here = self.done - self.restored
            while len(self._marks) > 1 and now - self._marks[0][0] > _RATE_SECONDS:
                self._marks.popleft()
            since, before = self._marks[0]
            self._marks.append((now, here))
            rate = (here - before) / (now - since) if now > since else 0.0
            total = self._source.total
            left = None if total is None or not rate else (total - self.done) / rate
            said = MapProgress(
                self.done, total, self.failed, self.restored, rate, left, now - self._begun, self.ended
            )
            ctx, node_id = self._ctx, self._group.node_id
            await ctx.fire.fire("on_map_progress", calls, node_id, lambda: (ctx.run_id, node_id, said))
        finally:
            self._telling = False


class _Crew:
    """Tasks, so many at once. The first exception cancels and awaits the rest, and comes out as itself."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._running: set[asyncio.Task[None]] = set()
        self._failed: list[BaseException] = []
        #: Whether the others were cancelled, and whether one was cancelled by somebody else.
        self._aborted = self._lost = False
        #: Awaited by who has more work, and by who waits for all of it.
        self._room: asyncio.Future[None] | None = None
        self._idle: asyncio.Future[None] | None = None

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)

    async def room(self) -> None:
        """Wait until another task may start. The one that asks is one of those that run, and does not count."""
        while self._limit is not None and len(self._running) > self._limit:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    async def all(self, feeder: Coroutine[Any, Any, None]) -> None:
        """Await a task that starts others, and those. A cancellation cancels them all, and comes out at their end."""
        cancelled = False
        self.start(feeder)
        while self._running:
            self._idle = asyncio.get_running_loop().create_future()
            try:
                await self._idle
            except asyncio.CancelledError:
                cancelled = True
                self._abort()
        cancelled, failed = cancelled or self._lost, self._failed
        # In the order in which they failed; what tells the process to stop is told first.
        first = next((e for e in failed if not isinstance(e, Exception)), failed[0] if failed else None)
        if cancelled and (first is None or isinstance(first, Exception)):
            raise asyncio.CancelledError
        if first is not None:
            raise first

    def _abort(self) -> None:
        self._aborted = True
        for task in self._running:
            task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        error = None
        if task.cancelled():
            self._lost = self._lost or not self._aborted
        else:
            error = task.exception()
        if error is not None:
            self._failed.append(error)
            if len(self._failed) == 1:
                self._abort()
        for waiter in (self._room, None if self._running else self._idle):
            if waiter is not None and not waiter.done():
                waiter.set_result(None)
