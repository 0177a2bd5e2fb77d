"""Run the items of a map with bounded concurrency and constant memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from time import monotonic, perf_counter_ns
from typing import Any, Final, cast

from pydantic import BaseModel, ConfigDict

from stroma._utils.text import one_line
from stroma.checkpoint import Committed, PipelineChanged, StepCall, inside_of
from stroma.checkpoint.entries import OF_MAP
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.node import Group, Node, contract_of_node, first_in
from stroma.contracts.schema import schema_of
from stroma.contracts.untyped import UntypedState
from stroma.engine.commit import failed_of, settle
from stroma.engine.context import ReliabilityContext, Stopping
from stroma.engine.execution import RunningNode
from stroma.engine.loop import execute, reject
from stroma.engine.outcome import GroupStopped, Halt, Place, paused
from stroma.engine.restore import check_committed, failed_items_in, output_schema, read_output, value_of
from stroma.engine.tasks import TaskPool, raise_if
from stroma.failures.classes import FailureClass
from stroma.failures.errors import CircuitOpen, ItemFailure, WaitedTooLong
from stroma.failures.failure import Failure, isinstance_by_type
from stroma.hooks.sets import MapProgress
from stroma.runner.items import Item, LinesFile, Source
from stroma.trace.events import COLLECTED, AttemptRow, BoundedRows, Outcome

#: Items that run at once where their number has no bound and no limit is set.
DEFAULT_CONCURRENCY: Final = 64
#: Events in the trace of a map that keeps no outputs, and as many failures after those.
_MAX_EVENTS: Final = 1000
_PAGE_ITEMS: Final = 200  # that are looked up in the journal at once
_PROGRESS_SECONDS: Final = 0.2


class ChildEnds:
    """Children of a group that did not end with an output."""

    def __init__(self) -> None:
        self.stopped: Halt | None = None
        self.suspended: Halt | None = None

    def note(self, halt: Halt) -> None:
        """Take the end of a child. Raises GroupStopped to cancel its siblings, unless they are to go on."""
        if halt.suspended:  # Its siblings go on, so that only the suspended ones remain to be run.
            self.suspended = self.suspended or halt
            return
        self.stopped = self.stopped or halt
        # A spent budget cancels no sibling in flight: those are paid for. No further one starts.
        if not self.stopped.spent:
            raise GroupStopped(halt)

    def check(self) -> None:
        """Raise GroupStopped for a child that stopped for good, else for one that is suspended."""
        for halt in (self.stopped, self.suspended):
            if halt is not None:
                raise GroupStopped(halt)


class ProgressReporter:
    """Counts the items of a map that have ended, and calls the progress hooks a few times a second."""

    def __init__(self, ctx: ReliabilityContext, execution: RunningNode, source: Source) -> None:
        self._ctx = ctx
        self._execution = execution
        self._source = source
        self._start = self._last_report = monotonic()
        self._is_reporting = False
        self.done = self.failed = self.restored = 0

    async def count_item(self, *, failed: bool = False, restored: bool = False) -> None:
        """Count an item that has ended."""
        self.done += 1
        self.failed += failed
        self.restored += restored
        if not self._is_reporting and monotonic() - self._last_report >= _PROGRESS_SECONDS:
            await self.report()

    async def report(self, *, ended: bool = False) -> None:
        """Call the progress hooks."""
        ctx, node_id = self._ctx, self._execution.node_id
        now = self._last_report = monotonic()
        if ctx.fire.on_map_progress is None:
            return
        self._is_reporting = True
        try:
            elapsed, total = now - self._start, self._source.total
            rate = (self.done - self.restored) / elapsed if elapsed > 0 else 0.0
            progress = MapProgress(
                done=self.done,
                total=total,
                failed=self.failed,
                restored=self.restored,
                rate=rate,
                seconds_left=None if total is None or not rate else (total - self.done) / rate,
                elapsed_seconds=elapsed,
                ended=ended,
            )
            await ctx.fire.fire("on_map_progress", node_id, ctx.run_id, node_id, progress)
        finally:
            self._is_reporting = False


def is_apart(ctx: ReliabilityContext, position: int, branch: str) -> bool:
    """Return True for a place inside an item of a map that restores its items a few at a time."""
    return any(position == at and branch.startswith(prefix) for at, prefix in ctx.journal.apart)


class MapRun:
    """One attempt of a map."""

    def __init__(self, ctx: ReliabilityContext, execution: RunningNode, group: Group, source: Source) -> None:
        self._ctx = ctx
        self._execution = execution
        self._child = group.children[0]
        self._collects_failures = group.collects_failures
        self._source = source
        self._prefix = f"{execution.branch}." if execution.branch else ""
        self._inner_branches = branches_in(self._child)
        self._inside_step = inside_of(execution.step)
        self._pool = TaskPool(group.max_concurrency)
        self._ends = ChildEnds()
        self._reading = Stopping()  # Of the items of the source.
        self._progress = ProgressReporter(ctx, execution, source)
        self._may_have_committed = ctx.session.continued or execution.attempt > 1
        #: By index; None where they stay in the journal.
        self.outputs: dict[int, BaseModel] | None = {} if group.output_field else None
        self.failures: list[ItemFailure] = []  # Of the items that failed while the others went on.
        self.count = 0  # How many items have been read.
        if self.outputs is None:
            execution.children = BoundedRows(_MAX_EVENTS)
            execution.remembers = False
        if self._may_have_committed and ctx.journal.restored is ctx.session.restored:
            # A copy, from which this map removes what it has restored.
            ctx.journal.restored = dict(ctx.journal.restored)

    @property
    def _restored(self) -> dict[tuple[int, str], Committed]:
        return cast("dict[tuple[int, str], Committed]", self._ctx.journal.restored)

    async def run(self) -> None:
        """Run all items. Raises GroupStopped for the first that stopped for good, its siblings awaited."""
        if self.outputs is None:
            await self._read_journal([])  # A store without a journal raises here, before anything is called.
        await self._source.prepare()
        await self._progress.report()
        try:
            self._pool.start(self._start_items())
            await self._pool.join()
            self._ends.check()
            if self._ctx.stopping.interrupt is not None and self.count != self._progress.done:
                self._ctx.stopping.interrupt()
                await asyncio.Event().wait()  # Until that arrives.
        except Exception:
            await self._progress.report(ended=True)
            raise
        await self._progress.report(ended=True)
        self._ctx.account.failed_items += self._progress.failed
        failed, execution = self._progress.failed, self._execution
        # For a later process that restores the map.
        if execution.step is None and (self.outputs is None or failed):
            execution.step = StepCall(failed, OF_MAP + str(self.count).encode())

    # ------------------------------------------------------------------ starting items

    async def _start_items(self) -> None:
        ctx, ends = self._ctx, self._ends
        async with contextlib.aclosing(self._source.pages()) as pages:
            # A source may wait for its next items: a pause and a crossed limit end that.
            read = partial(self._reading.wait_unless_held, partial(anext, pages, None))
            while page := await ctx.stopping.wait_unless_held(read):
                committed = await self._find_committed(page) if self._may_have_committed else {}
                for item in page:
                    self.count = item.index + 1
                    if item.index in committed:
                        await self._restore(item, committed[item.index])
                        continue
                    await self._pool.wait_for_room()
                    if ctx.stopping.holds:
                        break
                    if ends.stopped is not None or ctx.stopping.interrupt is not None:
                        return
                    await self._start(item)
                if self._may_have_committed and self._source.page < _PAGE_ITEMS:
                    is_all = len(committed) == len(page)
                    self._source.page = min(_PAGE_ITEMS, 2 * self._source.page) if is_all else 1
        if ctx.stopping.holds or ends.stopped is not None:
            if ctx.stopping.is_paused:
                ends.suspended = ends.suspended or paused(ctx, self._child.node_id, 1)
            return
        if not self._may_have_committed or self.outputs is not None:
            return
        if await self._load_committed(range(self.count, self.count + 1)):
            raise self._pipeline_changed(f"there are only {self.count} items where there were more")

    async def _start(self, item: Item) -> None:
        try:
            if item.error is not None:
                raise ValueError(item.error)
            value = item_state(self._ctx.registry, self._child, item.value)
        except Exception as error:  # Code of the contract's class may raise anything.
            execution, branch = self._execution, self._branch(item.index)
            run = RunningNode(self._ctx, self._child.node_id, "item", execution.position, branch, execution)
            halt = await reject(self._ctx, run, self._child, UntypedState(item.value), error)
        else:
            self._pool.start(self._run_item(item, value))
            return
        await self._handle_halt(item, halt)

    # ------------------------------------------------------------------ items

    def _branch(self, index: int) -> str:
        return f"{self._prefix}{index}"

    def _call_of(self, item: Item) -> StepCall | None:
        return self._inside_step if item.checksum is None else StepCall(0, item.checksum)

    async def _run_item(self, item: Item, value: BaseModel, *, restored: bool = False) -> None:
        if self._ends.stopped is not None and not restored:
            return
        execution, branch = self._execution, self._branch(item.index)
        place = Place(execution.position, branch, "item", execution, step=self._call_of(item))
        outcome = await execute(self._ctx, self._child, value, place)
        if self.outputs is None:
            self._drop_inside(item.index)
        if isinstance(outcome, Halt):
            try:
                await self._handle_halt(item, outcome)
            finally:
                del outcome  # As in execute_in_turn().
            return
        if self.outputs is not None:
            self.outputs[item.index] = outcome
        await self._progress.count_item(restored=restored)

    async def _handle_halt(self, item: Item, halt: Halt) -> None:
        refusals = (WaitedTooLong, CircuitOpen)  # The node was not called.
        was_refused = any(isinstance_by_type(halt.failure.exception, kind) for kind in refusals)
        is_lasting = halt.suspended or halt.spent or halt.partial or was_refused
        if self._collects_failures and not (is_lasting or self._ctx.stopping.is_cancelled):
            await self._record_failure(item, halt.failure)
        else:
            self._ends.note(halt)
            if self._ends.stopped is not None:
                self._reading.holds = True
                self._reading.end_waits()

    async def _record_failure(self, item: Item, failure: Failure) -> None:
        """Commit the failure of an item in place of its output, so that a resume does not run it again."""
        ctx, execution, failed = self._ctx, self._execution, failure.innermost
        item_failure = ItemFailure(
            index=item.index,
            node_id=failed.node_id,
            failure_class=failure.failure_class,
            message=str(failure),
            reason=failure.reason,
            attempts=failed.attempt,
        )
        # An item that failed without an attempt, as one that a limit refused, is listed as a failed one.
        is_new = failure.mark is None
        row = AttemptRow(
            self._child.node_id,
            max(failure.attempt, 1),
            perf_counter_ns() + ctx.journal.epoch_ns,
            0,
            {},
            None,
            "failure" if is_new else cast("Outcome", COLLECTED),
            failed_of(failure) if is_new else None,
            None,
            execution.position,
            self._branch(item.index),
            execution.node_id,
            None,
            None,
            0,
        )
        again = partial(ctx.journal.record, row, schema_of(ItemFailure), item_failure, self._call_of(item))
        pending = again()
        if pending is not None:
            problem, cancelled = await settle(ctx, row, pending, again)
            if problem is not None:
                node_id, kind = self._child.node_id, FailureClass.RECOVERABLE
                stored = Failure(problem, kind, node_id, failure.attempt, str(problem), "store")
                self._ends.note(Halt(stored, partial=True))
                return
            raise_if(cancelled)
        if is_new and execution.children is not None:
            execution.children.append(row)
        if ctx.fire.delivers:
            ctx.session.delivered(row)
        ctx.run_logger.info(
            "item %d of %r failed and is skipped: %s", item.index, execution.node_id, one_line(str(failure))
        )
        await self._add_failure(item_failure)

    async def _add_failure(self, item_failure: ItemFailure, *, restored: bool = False) -> None:
        if self.outputs is not None:
            self.failures.append(item_failure)
        await self._progress.count_item(failed=True, restored=restored)

    # ------------------------------------------------------------------ restoring committed items

    async def _restore(self, item: Item, committed: Committed) -> None:
        """Restore an item that an earlier process, or an earlier attempt of the group, has committed."""
        ctx = self._ctx
        at = (self._execution.position, self._branch(item.index))
        if committed.is_failed_item:
            item_failure = cast("ItemFailure", read_output(schema_of(ItemFailure), committed, None))
            ctx.account.failed_items += failed_items_in(ctx, *at)
            await self._add_failure(item_failure, restored=True)
        elif self.outputs is None and isinstance(self._child, Node) and ctx.fire.on_node_skipped is None:
            # No hook receives the output, and write() reads it later: checking its contract is enough.
            schema = output_schema(ctx, self._child, None)
            check_committed(ctx, self._child, schema, committed, Place(*at, parent=self._execution))
            await self._progress.count_item(restored=True)
        elif item.error is None:
            self._restored[at] = committed
            value = item_state(ctx.registry, self._child, item.value)
            if self.outputs is None and self._inner_branches:
                schema = output_schema(ctx, self._child, value)
                if committed.contract.partition(":")[0] != schema.fingerprint:  # It is assembled again.
                    await self._load_inside([self._branch(item.index)])
            # It does not end with an output if it is a group whose schema has changed, which is merged again.
            await self._run_item(item, value, restored=True)
        if self.outputs is None:
            self._restored.pop(at, None)
            self._drop_inside(item.index)

    async def _find_committed(self, page: Sequence[Item]) -> dict[int, Committed]:
        """Return the committed outputs of a page, without items that must run. Raises PipelineChanged."""
        restored, position = self._ctx.journal.restored, self._execution.position
        if self.outputs is None:
            by_index = await self._load_committed([item.index for item in page])
        else:
            places = {item.index: (position, self._branch(item.index)) for item in page}
            by_index = {index: restored[at] for index, at in places.items() if at in restored}
        for item in page:
            committed = by_index.get(item.index)
            if committed is None:
                continue
            recorded = None if committed.step is None else committed.step.input_key
            if None not in (recorded, item.checksum) and recorded != item.checksum:
                raise self._pipeline_changed(self._source.describe_change(item.index))
            if self._must_run(committed):
                del by_index[item.index]
                self._restored.pop((position, self._branch(item.index)), None)
        return by_index

    async def _load_committed(self, indexes: Sequence[int]) -> dict[int, Committed]:
        """Return the committed outputs of items, and restore those of the nodes inside unfinished items."""
        branches = {self._branch(index): index for index in indexes}
        by_branch = await self._read_journal(list(branches))
        await self._load_inside([branch for branch in branches if self._must_run(by_branch.get(branch))])
        return {branches[branch]: committed for branch, committed in by_branch.items()}

    def _must_run(self, committed: Committed | None) -> bool:
        """Return True if an item is to be run: it has no output, or has failed and no longer may."""
        return committed is None or (committed.is_failed_item and not self._collects_failures)

    async def _load_inside(self, branches: Iterable[str]) -> None:
        """Restore the committed outputs of the nodes inside items."""
        inside = [f"{branch}.{rest}" for branch in branches for rest in self._inner_branches]
        if inside:
            for branch, committed in (await self._read_journal(inside)).items():
                self._restored[self._execution.position, branch] = committed

    async def _read_journal(self, branches: Sequence[str]) -> Mapping[str, Committed]:
        pending = self._ctx.session.committed(self._execution.position, branches)
        return pending if isinstance(pending, Mapping) else await pending

    def _drop_inside(self, index: int) -> None:
        """Forget the outputs of the nodes inside an item that has ended: there may be very many items."""
        for rest in self._inner_branches:
            at = (self._execution.position, f"{self._branch(index)}.{rest}")
            self._ctx.handover.done.pop(at, None)
            if self._may_have_committed:
                self._restored.pop(at, None)

    def _pipeline_changed(self, what: str) -> PipelineChanged:
        where = f"run {self._ctx.run_id!r} cannot be resumed at {self._execution.node_id!r}"
        return PipelineChanged(f"{where}: {what}; restore it, or start a new run")

    # ------------------------------------------------------------------ outputs

    async def write(self, file: LinesFile, failures: LinesFile | None = None) -> None:
        """Write the outputs and the failures from the journal to files, in the order of the items."""
        files = [file] if failures is None else [file, failures]
        try:
            for opened in files:
                await asyncio.to_thread(opened.open)
            for first in range(0, self.count, _PAGE_ITEMS):
                outputs: list[Any] = []
                failed: list[Any] = []
                for value in await self._values(range(first, min(self.count, first + _PAGE_ITEMS))):
                    (failed if isinstance(value, ItemFailure) else outputs).append(value)
                await asyncio.to_thread(file.write, outputs)
                if failures is not None and failed:
                    await asyncio.to_thread(failures.write, failed)
            for opened in reversed(files):
                await asyncio.to_thread(opened.publish)
        except BaseException:
            for opened in files:
                opened.discard()
            raise

    async def _values(self, indexes: range) -> list[Any]:
        by_branch = await self._read_journal([self._branch(index) for index in indexes])
        missing = next((index for index in indexes if self._branch(index) not in by_branch), None)
        if missing is not None:
            raise PipelineChanged(
                f"item {missing} of {self._execution.node_id!r} in run {self._ctx.run_id!r} is no longer in "
                "the journal; start a new run"
            )
        registry, child = self._ctx.registry, self._child
        return [value_of(registry, child, by_branch[self._branch(index)]) for index in indexes]


def branches_in(node: Node | Group) -> list[str]:
    """Return the branches below a node that are known before it runs."""
    if isinstance(node, Node) or node.is_map:
        return []
    return [
        branch
        for index, child in enumerate(node.children)
        for branch in (str(index), *(f"{index}.{rest}" for rest in branches_in(child)))
    ]


def item_output(output: BaseModel) -> Any:
    """Return the output of an item as an element of the list of outputs."""
    return output.root if isinstance(output, UntypedState) else schema_of(type(output)).clone(output)


def item_state(registry: ContractRegistry, node: Node | Group, item: Any) -> BaseModel:
    """Return an item as a state that the input contract of its node can validate."""
    if isinstance(item, BaseModel):
        if isinstance(first_in(node), Node):
            return item
        item = schema_of(type(item)).raw(item)  # The class of a group's output is made from MapItem.
    if isinstance(item, dict):
        return _open_model(item) if all(isinstance(k, str) for k in item) else UntypedState(item)
    contract = contract_of_node(first_in(node), registry)
    if contract is not None and not contract.input_schema.__pydantic_root_model__:
        required = [n for n, info in contract.input_schema.model_fields.items() if info.is_required()]
        if len(required) == 1:
            return _open_model({required[0]: item})
    return UntypedState(item)


def _open_model(fields: dict[str, Any]) -> BaseModel:
    return schema_of(MapItem).construct(fields)


class MapItem(BaseModel):
    """Fields of an item before its node's contract validates them."""

    model_config = ConfigDict(extra="allow", arbitrary_types_allowed=True)
