"""TemporalRunner: submits runs whose workers Temporal chooses, and controls them."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from temporalio.client import Client

from stroma.checkpoint.decisions import GIVEN_UP
from stroma.checkpoint.manager import CheckpointManager
from stroma.contracts.contract import ContractRegistry
from stroma.drivers.temporal.worker import shared_store
from stroma.drivers.temporal.workflow import WAKE, Dispatcher
from stroma.engine.config import RunConfig
from stroma.runner.pipeline import Pipeline
from stroma.runner.runner import StromaRunner
from stroma.trace.result import ExecutionResult

if TYPE_CHECKING:
    from typing import Unpack

    from stroma.runner.pipeline import SubmitOptions
    from stroma.runner.submission import RunHandle


class TemporalRunner:
    """Submits and controls runs that workers of a Temporal task queue drive; see :func:`stroma_worker`.

    Everything is in the store, which the workers share. Each method writes the store first and wakes the
    workflow of the run then. Where the server cannot be reached, a warning is logged, and the run continues
    once it can be; ``resume`` raises.

    Args:
        task_queue: that of the workers.
        store: the store of the workers, or its URL.
        config: run id and tags of submitted runs. Workers have the configuration of the pipelines.

    Raises StoreError for a store that processes cannot share. All methods raise what those of StromaRunner
    raise, and RPCError if the server refuses.
    """

    def __init__(self, client: Client, task_queue: str, store: Any, config: RunConfig | None = None) -> None:
        self.store = shared_store(store)
        self._local = StromaRunner(ContractRegistry(), CheckpointManager(self.store), config)
        self._dispatcher = Dispatcher(client, task_queue)

    async def submit(
        self, pipeline: Pipeline, initial_state: BaseModel, **options: Unpack[SubmitOptions]
    ) -> RunHandle[Any]:
        """Create a QUEUED run, start its workflow, and return its handle; see :meth:`StromaRunner.submit`.

        Once the run is stored it is started, if not from here: workers look for submitted runs without a
        workflow.
        """
        run_id = (await self._local.submit(pipeline, initial_state, **options)).run_id
        record = await self._local._stored.get(run_id)
        if record.status not in GIVEN_UP:
            await self._dispatcher.wake(record)
        return self.handle(run_id, pipeline)

    async def run(
        self, pipeline: Pipeline, initial_state: BaseModel, **options: Unpack[SubmitOptions]
    ) -> ExecutionResult[Any]:
        """Submit a run, and wait until it has ended or is suspended; a suspended run returns its questions.

        A run of that id that has ended returns its result. Giving up the wait changes nothing.
        """
        handle = await self.submit(pipeline, initial_state, **options)
        return await handle.until_stopped()

    def handle(self, run_id: str, pipeline: Pipeline | None = None) -> RunHandle[Any]:
        """Return the handle of a run of any origin; see :meth:`StromaRunner.handle`."""
        handle = self._local.handle(run_id, pipeline)
        handle._calls = handle._calls._replace(send=self.send, cancel=self.cancel)
        return handle

    async def resume(self, run_id: str) -> bool:
        """Continue a run that stopped, also as failed or cancelled; committed nodes are not called again.

        Returns False if it is complete, or has an owner. Raises CheckpointNotFound, StoreError, and RPCError
        if the server cannot be reached: call it again then.
        """
        is_due: bool = await self.store.reopen(run_id)
        if is_due:
            await self._dispatcher.start(await self._local._stored.get(run_id), start_signal=WAKE)
        return is_due

    async def signal(self, run_id: str, answer: Any, **options: Any) -> None:
        """Answer a question, and continue the run; see :meth:`StromaRunner.signal`."""
        await self._wake_after(self._local.signal(run_id, answer, **options), run_id)

    async def send(self, run_id: str, message: Any, **options: Any) -> None:
        """Store a message to a run, and continue the run; see :meth:`StromaRunner.send`."""
        await self._wake_after(self._local.send(run_id, message, **options), run_id)

    async def cancel(self, run_id: str) -> bool:
        """End a run as CANCELLED; see :meth:`StromaRunner.cancel`."""
        return await self._wake_after(self._local.cancel(run_id), run_id)

    async def pause(self, run_id: str) -> bool:
        """Suspend a run; see :meth:`StromaRunner.pause`."""
        return await self._wake_after(self._local.pause(run_id), run_id)

    async def unpause(self, run_id: str) -> bool:
        """Take a pause back, and continue the run; see :meth:`StromaRunner.unpause`."""
        return await self._wake_after(self._local.unpause(run_id), run_id)

    async def set_budget(self, run_id: str, **limits: Any) -> bool:
        """Change limits of a run; see :meth:`StromaRunner.set_budget`."""
        return await self._wake_after(self._local.set_budget(run_id, **limits), run_id)

    async def _wake_after(self, change: Awaitable[bool | None], run_id: str) -> bool:
        """Await a change of a run in the store, and wake its workflow. Return False if none was to make."""
        is_done = await change is not False
        if is_done:
            await self._dispatcher.wake(await self._local._stored.get(run_id))
        return is_done
