"""Run the items of a map with bounded concurrency and constant memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from functools import partial
from time import perf_counter_ns
from typing import Any, Final, cast

from pydantic import BaseModel

from stroma._utils.text import one_line
from stroma.checkpoint import Committed, PipelineChanged, StepCall, inside_of
from stroma.checkpoint.entries import OF_MAP
from stroma.contracts.contract import ContractViolation
from stroma.contracts.node import Group, Node
from stroma.contracts.schema import schema_of
from stroma.engine.commit import failed_of, record, settle
from stroma.engine.context import ReliabilityContext
from stroma.engine.execution import NodeExecution
from stroma.engine.holds import paused
from stroma.engine.loop import execute
from stroma.engine.outcome import GroupStopped, Halt, Place
from stroma.engine.restore import check_committed, output_schema, read_output, value_of
from stroma.engine.tasks import TaskPool, raise_if
from stroma.failures.classes import FailureClass
from stroma.failures.errors import ItemFailure
from stroma.failures.failure import Failure, text_of
from stroma.runner.items import Item, LinesFile, Source
from stroma.runner.map_progress import ProgressReporter
from stroma.runner.states import item_state
from stroma.trace.events import AttemptRow, BoundedRows, Outcome

__all__ = ["DEFAULT_CONCURRENCY", "MapRun", "branches_in"]

#: Items that run at once where their number has no bound and no limit is set.
DEFAULT_CONCURRENCY: Final = 64
#: Events in the trace of a map that keeps no outputs, and as many failures after those.
_MAX_EVENTS: Final = 1000
_PAGE_ITEMS: Final = 200  # that are looked up in the journal at once


class MapRun:
    """One attempt of a map.

    Attributes:
        outputs: by index; None where they stay in the journal.
        failures: of the items that failed while the others went on.
        count: how many items have been read.
    """

    def __init__(
        self, ctx: ReliabilityContext, execution: NodeExecution, group: Group, source: Source
    ) -> None:
        self._ctx = ctx
        self._execution = execution
        self._child = group.children[0]
        self._collects_failures = group.collects_failures
        self._source = source
        self._prefix = f"{execution.branch}." if execution.branch else ""
        self._inner_branches = branches_in(self._child)
        self._inside_step = inside_of(execution.step)
        self._pool = TaskPool(group.max_concurrency)
        self._stopped: Halt | None = None
        self._suspended: Halt | None = None
        self._progress = ProgressReporter(ctx, execution, source)
        self._may_have_committed = ctx.session.continued or execution.attempt > 1
        keeps_outputs = bool(group.output_field)
        self.outputs: dict[int, BaseModel] | None = {} if keeps_outputs else None
        self.failures: list[ItemFailure] = []
        self.count = 0
        if not keeps_outputs:
            execution.children = BoundedRows(_MAX_EVENTS)
            execution.remembers = False
        if self._may_have_committed and ctx.restored is ctx.session.restored:
            ctx.restored = dict(ctx.restored)  # A copy, from which this map removes what it has restored.

    @property
    def _restored(self) -> dict[tuple[int, str], Committed]:
        return cast("dict[tuple[int, str], Committed]", self._ctx.restored)

    async def run(self) -> None:
        """Run all items. Raises GroupStopped for the first that stopped for good, its siblings awaited."""
        if self.outputs is None:
            await self._read_journal([])  # A store without a journal raises here, before anything is called.
        await self._source.prepare()
        if self._may_have_committed:
            await self._check_source()
        await self._progress.report()
        try:
            await self._run_all()
        except Exception:
            await self._progress.end()
            raise
        await self._progress.end()
        self._ctx.failed_items += self._progress.failed
        if (self.outputs is None or self._progress.failed) and self._execution.step is None:
            # Committed with the group, for a later process that restores it.
            self._execution.step = StepCall(self._progress.failed, OF_MAP + str(self.count).encode())

    async def _run_all(self) -> None:
        self._pool.start(self._start_items())
        await self._pool.join()
        for halt in (self._stopped, self._suspended):
            if halt is not None:
                raise GroupStopped(halt)
        if self._ctx.interrupt is not None and self.count != self._progress.done:
            self._ctx.interrupt()
            await asyncio.Event().wait()  # Until that arrives.

    # ------------------------------------------------------------------ starting items

    @property
    def _has_stopped(self) -> bool:
        return self._stopped is not None or self._ctx.interrupt is not None or self._ctx.holds

    async def _start_items(self) -> None:
        async with contextlib.aclosing(self._source.pages()) as pages:
            async for page in pages:
                committed = await self._find_committed(page) if self._may_have_committed else {}
                for item in page:
                    self.count = item.index + 1
                    if item.index in committed:
                        await self._restore(item, committed[item.index])
                        continue
                    await self._pool.wait_for_room()
                    if self._has_stopped:
                        if self._ctx.paused:
                            self._suspended = self._suspended or paused(self._ctx, self._child.node_id, 1)
                        return
                    await self._start(item)
                if self._may_have_committed and self._source.page < _PAGE_ITEMS:
                    self._source.page = (
                        min(_PAGE_ITEMS, 2 * self._source.page) if len(committed) == len(page) else 1
                    )
        if not self._may_have_committed or self.outputs is not None:
            return
        if await self._load_committed(range(self.count, self.count + 1)):
            raise self._pipeline_changed(f"there are only {self.count} items where there were more")

    async def _start(self, item: Item) -> None:
        if item.error is None:
            try:
                value = item_state(self._ctx.registry, self._child, item.value)
            except Exception as error:  # Code of the contract's class may raise anything.
                await self._refuse(item, f"{type(error).__name__}: {error}")
                return
            self._pool.start(self._run_item(item, value))
        else:
            await self._refuse(item, item.error)

    async def _refuse(self, item: Item, why: str) -> None:
        """Fail an item that is no valid input, without a call."""
        raw = {"item": item.index, "value": item.value}
        violation = ContractViolation(
            self._child.node_id, "input", raw, [{"type": "item", "loc": (), "msg": why, "input": item.value}]
        )
        failure = Failure(violation, FailureClass.TERMINAL, self._child.node_id, 0, str(violation))
        await self._handle_halt(item, Halt(self._ctx.redactor.mask_failure(failure, ())))

    # ------------------------------------------------------------------ items

    def _branch(self, index: int) -> str:
        return f"{self._prefix}{index}"

    def _call_of(self, item: Item) -> StepCall | None:
        return self._inside_step if item.checksum is None else StepCall(0, item.checksum)

    async def _run_item(self, item: Item, value: BaseModel) -> None:
        if self._stopped is not None:
            return
        outcome = await self._execute(item, value)
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
        await self._progress.count_item()

    async def _execute(self, item: Item, value: BaseModel) -> BaseModel | Halt:
        execution = self._execution
        place = Place(
            execution.position, self._branch(item.index), "item", execution, step=self._call_of(item)
        )
        return await execute(self._ctx, self._child, value, place)

    async def _handle_halt(self, item: Item, halt: Halt) -> None:
        if halt.suspended:  # Its siblings go on, so that only the suspended items remain to be run.
            self._suspended = self._suspended or halt
            return
        if self._collects_failures and not halt.spent and not halt.partial and not self._ctx.cancelled:
            await self._record_failure(item, halt.failure)
            return
        self._stopped = self._stopped or halt
        # A spent budget cancels no sibling in flight: those are paid for. No further one starts.
        if not self._stopped.spent:
            raise GroupStopped(halt)

    async def _record_failure(self, item: Item, failure: Failure) -> None:
        """Commit the failure of an item in place of its output, so that a resume does not run it again."""
        ctx, execution, failed = self._ctx, self._execution, failure.inner or failure
        item_failure = ItemFailure(
            index=item.index,
            node_id=failed.node_id,
            failure_class=failure.failure_class,
            message=failure.message,
            reason=failure.reason,
            attempts=failed.attempt,
        )
        row = AttemptRow(
            self._child.node_id,
            failure.attempt + 1,
            perf_counter_ns() + ctx.epoch_ns,
            0,
            {},
            None,
            cast("Outcome", "collected"),
            failed_of(failure),
            None,
            execution.position,
            self._branch(item.index),
            execution.node_id,
            None,
            None,
            0,
        )
        call = self._call_of(item)
        schema = schema_of(ItemFailure)
        record_again = partial(record, ctx, row, schema, item_failure, call)
        pending = record_again()
        if pending is not None:
            problem, cancelled = await settle(ctx, row, pending, record_again)
            if problem is not None:
                store_failure = Failure(
                    problem,
                    FailureClass.RECOVERABLE,
                    self._child.node_id,
                    failure.attempt,
                    str(problem),
                    "store",
                )
                self._stopped = self._stopped or Halt(store_failure, partial=True)
                raise GroupStopped(self._stopped)
            raise_if(cancelled)
        if ctx.delivers:
            ctx.session.delivered(row)
        # The log of the attempt shows the message; here there is no state by which redact could hide parts of
        # it.
        why = one_line(text_of(failure)) if ctx.config.redact is None else failure.failure_class
        ctx.run_logger.info("item %d of %r failed and is skipped: %s", item.index, execution.node_id, why)
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
            await self._add_failure(item_failure, restored=True)
        elif self.outputs is None and isinstance(self._child, Node) and ctx.fire.on_node_skipped is None:
            # No hook receives the output, and write() reads it later: checking its contract is enough.
            schema = output_schema(ctx, self._child, None)
            place = Place(*at, parent=self._execution)
            check_committed(ctx, self._child, schema, committed, place)
            await self._progress.count_item(restored=True)
        elif item.error is None:
            self._restored[at] = committed
            value = item_state(ctx.registry, self._child, item.value)
            if self.outputs is None and self._inner_branches:
                schema = output_schema(ctx, self._child, value)
                if committed.contract.partition(":")[0] != schema.fingerprint:  # It is assembled again.
                    await self._load_inside([self._branch(item.index)])
            outcome = await self._execute(item, value)
            if isinstance(outcome, Halt):  # A group whose schema has changed is merged again.
                await self._handle_halt(item, outcome)
                return
            if self.outputs is not None:
                self.outputs[item.index] = outcome
            await self._progress.count_item(restored=True)
        if self.outputs is None:
            self._restored.pop(at, None)
            self._drop_inside(item.index)

    async def _find_committed(self, page: Sequence[Item]) -> dict[int, Committed]:
        """Return the committed outputs of a page by index, without those to be run again. Raises PipelineChanged."""
        ctx, position = self._ctx, self._execution.position
        if self.outputs is None:
            by_index = await self._load_committed([item.index for item in page])
        else:
            by_index = {
                item.index: ctx.restored[position, self._branch(item.index)]
                for item in page
                if (position, self._branch(item.index)) in ctx.restored
            }
        for item in page:
            committed = by_index.get(item.index)
            if committed is None:
                continue
            self._check_same(item.index, item.checksum, committed)
            if self._must_run(committed):
                del by_index[item.index]
                self._restored.pop((position, self._branch(item.index)), None)
        return by_index

    async def _load_committed(self, indexes: Sequence[int]) -> dict[int, Committed]:
        """Return the committed outputs of items by index, and restore those of the nodes inside unfinished items."""
        branches = {self._branch(index): index for index in indexes}
        by_branch = await self._read_journal(list(branches))
        await self._load_inside([branch for branch in branches if self._must_run(by_branch.get(branch))])
        return {branches[branch]: committed for branch, committed in by_branch.items()}

    def _must_run(self, committed: Committed | None) -> bool:
        """Return True if an item is to be run: it has no output, or has failed and is to be tried again."""
        if committed is None:
            return True
        retries = not self._collects_failures or self._ctx.config.retry_failed_items
        return committed.is_failed_item and retries

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
            self._ctx.done.pop(at, None)
            if self._may_have_committed:
                self._restored.pop(at, None)

    async def _check_source(self) -> None:
        """Raise PipelineChanged, before anything is called, if the source as a whole has changed."""
        total = self._source.total
        if total is None or self.outputs is not None:
            return
        async with contextlib.aclosing(self._source.pages()) as pages:
            first: Sequence[Item] = await anext(pages, ())
        checksum = first[0].checksum if first else None
        if checksum is None or not checksum.startswith(b"item of "):
            return
        for start in range(0, total, _PAGE_ITEMS):
            committed = await self._load_committed(range(start, min(total, start + _PAGE_ITEMS)))
            if committed:
                index = min(committed)
                self._check_same(index, checksum, committed[index])
                return

    def _check_same(self, index: int, checksum: bytes | None, committed: Committed) -> None:
        recorded = None if committed.step is None else committed.step.input_key
        if recorded is not None and checksum is not None and recorded != checksum:
            raise self._pipeline_changed(self._source.describe_change(index))

    def _pipeline_changed(self, what: str) -> PipelineChanged:
        return PipelineChanged(
            f"run {self._ctx.run_id!r} cannot be resumed at {self._execution.node_id!r}: {what}; restore it, or start a new run"
        )

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
                async for _, value in self._values(range(first, min(self.count, first + _PAGE_ITEMS))):
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

    async def _values(self, indexes: range) -> AsyncIterator[tuple[int, Any]]:
        by_branch = await self._read_journal([self._branch(index) for index in indexes])
        for index in indexes:
            committed = by_branch.get(self._branch(index))
            if committed is None:
                raise PipelineChanged(
                    f"item {index} of {self._execution.node_id!r} in run {self._ctx.run_id!r} is no longer in the journal; "
                    "start a new run"
                )
            yield index, value_of(self._ctx.registry, self._child, committed)


def branches_in(node: Node | Group) -> list[str]:
    """Return the branches below a node that are known before it runs."""
    if isinstance(node, Node) or node.is_map:
        return []
    return [
        branch
        for index, child in enumerate(node.children)
        for branch in (str(index), *(f"{index}.{rest}" for rest in branches_in(child)))
    ]
