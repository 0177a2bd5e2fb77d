"""The activity that drives a run."""

from __future__ import annotations

import asyncio
import contextvars
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from temporalio import activity

from stroma._utils.logs import get_logger
from stroma.checkpoint import CheckpointNotFound
from stroma.drivers.temporal.workflow import DRIVE, Answer
from stroma.runner.drive import Blocked, Busy, DriveOutcome, Ended, Suspended
from stroma.runner.pipeline import Pipeline
from stroma.runner.runner import StromaRunner

logger = get_logger()


class DriveActivity:
    """Drives runs of some pipelines in one worker."""

    def __init__(self, runner: StromaRunner[Any], pipelines: Sequence[Pipeline], max_seconds: float) -> None:
        self._runner = runner
        self._pipelines = pipelines
        self._max_seconds = max_seconds  # Slice of a run in one activity.
        self._pulses: dict[str, list[Pulse]] = {}

    @activity.defn(name=DRIVE)
    async def drive(self, run_id: str, pipeline: str, cancels: bool = False) -> dict[str, Any]:
        """Continue a run as far as possible, or cancel it first. Every outcome of ``drive`` is an answer."""
        try:
            if cancels:
                await self._runner.cancel(run_id)
            with self._pulse(run_id):
                outcome = await self._drive(run_id)
        except CheckpointNotFound as error:
            logger.warning("the workflow of a run that was deleted ends: %s", error)
            return dict(Answer(outcome="ended", status="DELETED"))
        if isinstance(outcome, Blocked):
            logger.warning("run %r of %r is blocked: %s", run_id, pipeline, outcome.reason)
        return dict(_to_answer(outcome))

    async def _drive(self, run_id: str) -> DriveOutcome:
        driving = asyncio.ensure_future(
            self._runner.drive(run_id, pipelines=self._pipelines, max_seconds=self._max_seconds)
        )
        leaving = asyncio.ensure_future(activity.wait_for_worker_shutdown())
        reactions: list[asyncio.Future[Any]] = []
        waiting: set[asyncio.Future[Any]] = {driving, leaving}
        try:
            while not driving.done():
                try:
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                except asyncio.CancelledError:
                    reactions.append(asyncio.ensure_future(self._react(run_id)))
                if leaving.done() and leaving in waiting:
                    waiting.discard(leaving)
                    logger.info("run %r ends at its next step boundary: its worker is shut down", run_id)
                    reactions.append(asyncio.ensure_future(self._runner.shutdown(drain_seconds=math.inf)))
            details = activity.cancellation_details()
            if details is not None and (details.paused or details.reset) and driving.exception() is None:
                raise asyncio.CancelledError  # The server starts another attempt in its time.
            return driving.result()
        finally:
            leaving.cancel()
            for reaction in reactions:
                reaction.cancel()

    async def _react(self, run_id: str) -> None:
        """React to a cancellation of the activity. ``drive`` then returns."""
        details = activity.cancellation_details()
        if details is not None and details.cancel_requested:
            await self._runner.cancel(run_id)
        elif details is not None and details.worker_shutdown:
            await self._runner.shutdown(drain_seconds=0.0)  # The graceful time is over.
        else:
            # Paid steps in flight are committed.
            why = "its workflow was terminated or reset, or it was late"
            logger.warning("run %r ends at its next step boundary: %s", run_id, why)
            self._runner._live.drain(run_id)

    # ------------------------------------------------------------------ heartbeats

    @contextmanager
    def _pulse(self, run_id: str) -> Iterator[None]:
        pulse = Pulse()
        pulses = self._pulses.setdefault(run_id, [])
        pulses.append(pulse)
        try:
            yield
        finally:
            pulse.end()
            pulses.remove(pulse)
            if not pulses:
                del self._pulses[run_id]

    def beat(self, run_id: str) -> None:
        """Send heartbeats: the lease of a run was renewed. Called in the thread that renews leases."""
        try:
            details = {"status": "RUNNING", **self._runner._live.progress(run_id)}
            for pulse in list(self._pulses.get(run_id, ())):
                pulse.beat(details)
        except Exception:  # The thread must survive: it renews the leases of this process.
            logger.exception("a heartbeat of run %r could not be sent", run_id)


class Pulse:
    """Heartbeats of one activity, sent from another thread, so that a blocked event loop stops none."""

    def __init__(self) -> None:
        self._context = contextvars.copy_context()
        self._lock = threading.Lock()
        self._has_ended = False

    def beat(self, details: dict[str, Any]) -> None:
        with self._lock:
            if not self._has_ended:
                self._context.run(asyncio.run, _send(details))

    def end(self) -> None:
        """Send no more; return once a heartbeat under way was sent."""
        with self._lock:
            self._has_ended = True


async def _send(details: dict[str, Any]) -> None:
    # The SDK encodes the details in a task of the running loop, then hands them to its core, in any thread.
    activity.heartbeat(details)
    await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))


def _to_answer(outcome: DriveOutcome) -> Answer:
    if isinstance(outcome, Ended):
        return {"outcome": "ended", "status": str(outcome.status)}
    if isinstance(outcome, Suspended):
        return {"outcome": "suspended", "status": "SUSPENDED", "until_ms": _to_ms(outcome.until)}
    if isinstance(outcome, Busy):
        return {"outcome": "busy", "status": "RUNNING", "until_ms": _to_ms(outcome.until)}
    if isinstance(outcome, Blocked):
        return {"outcome": "blocked", "status": "BLOCKED", "until_ms": _to_ms(outcome.until)}
    return {"outcome": "yielded", "status": "INTERRUPTED"}


def _to_ms(time: datetime | None) -> int | None:
    return None if time is None else int(time.timestamp() * 1000)
