"""Trial: run a pipeline that dies at a boundary, in this process or in a forked one."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import select
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from stroma._utils.access import error_text
from stroma.checkpoint.sqlite.store import SQLiteStore
from stroma.contracts.codec import decode_raw
from stroma.contracts.schema import schema_of
from stroma.engine.context import INTERCEPTORS
from stroma.runner.rehearsal import Rehearsal, missing_reply
from stroma.runner.runner import StromaRunner
from stroma.testing.clock import FakeClock
from stroma.testing.crash import Boundary, Crashed, Deaths, Life
from stroma.testing.faults import FaultPlan
from stroma.trace.plain import jsonable
from stroma.trace.result import RunStatus


@dataclass(slots=True)
class ProcessRecord(Life):
    """Record of one process, and what it has come to."""

    status: str = ""
    state: Any = None
    effects: Any = None

    @property
    def how_it_ended(self) -> str:
        why = f", {self.failure}" if self.failure else ""
        return f"ends as {self.status or 'a process that died'}{why}"


@dataclass(slots=True)
class Trial:
    """Settings of a proof: pipeline, store, and whether processes are real."""

    proven: Any
    state: BaseModel
    runner: StromaRunner[Any]
    path: Path
    processes: bool
    effects: Callable[[], Any] | None
    reset: Callable[[], Any] | None
    timeout_seconds: float
    rehearsal: Rehearsal

    def fresh(self) -> None:
        """Reset everything outside of the pipeline."""
        if self.reset is not None:
            self.reset()

    async def live(self, run_id: str, *, resume: bool, die_at: Boundary | None = None) -> ProcessRecord:
        if not self.processes:
            life = ProcessRecord()
            await self._run(run_id, resume, Deaths(lambda boundary: boundary == die_at, life=life), life)
            return life
        return await self._in_child(run_id, resume, die_at)

    async def _run(self, run_id: str, resume: bool, deaths: Deaths, life: ProcessRecord) -> None:
        store = SQLiteStore(self.path, synchronous="normal")
        INTERCEPTORS.insert(0, deaths)
        clock = contextlib.nullcontext() if FakeClock._active is not None else FakeClock()
        try:
            with clock:
                await self._drive(store, run_id, resume, life)
        except Crashed:
            pass
        finally:
            INTERCEPTORS.remove(deaths)
            await store.aclose()
        if self.effects is not None and life.died is None:
            life.effects = jsonable(self.effects())

    async def _drive(self, store: SQLiteStore, run_id: str, resume: bool, life: ProcessRecord) -> None:
        context = self.runner._config_of(self.proven).context
        if isinstance(context, dict):  # Its keys are of one process; its values, such as clients, are shared.
            context = dict(context)
        twin = self.runner._twin(self.proven, store, run_id=run_id, context=context, resume=resume)
        state = schema_of(type(self.state)).copy(self.state)
        try:
            result = await self.rehearsal.run(twin, self.proven, state, resume=resume)
        except Exception as error:  # StoreError of the opening, such as PipelineChanged.
            life.status, life.failure = RunStatus.FAILED, error_text(error)
            return
        life.status = result.status
        if result.failure is not None:
            life.failure = f"node {result.failure.node_id!r}: {result.failure}"
        elif result.status is RunStatus.SUSPENDED:
            life.failure = missing_reply(result)
        final = result.final_state
        if final is not None:
            life.state = jsonable(decode_raw(schema_of(type(final)).encode(final)))

    # ------------------------------------------------------------------ processes

    async def _in_child(self, run_id: str, resume: bool, die_at: Boundary | None) -> ProcessRecord:
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            # Of threads, which the child does not have and does not need.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:  # pragma: no cover - it exits without writing coverage data.
            os.close(reading)
            self._run_child(writing, run_id, resume, die_at)
        os.close(writing)
        # In a thread, so that a server on this event loop can answer the child.
        text, code = await asyncio.to_thread(_listen, child, reading, self.timeout_seconds)
        life = ProcessRecord()
        for line in text.splitlines():
            what, of = json.loads(line)
            if what == "seen":
                life.boundaries.append(Boundary(*of))
            elif what == "committed":
                life.committed.append((of[0], of[1]))
            elif what == "met":
                for plan, met in zip(_plans(), of, strict=True):
                    plan.note_met(met)
            else:
                life.status, life.failure, life.state, life.effects, self.rehearsal.places = of
        if code is None:
            last = f"; its last boundary is: {life.boundaries[-1]}" if life.boundaries else ""
            raise AssertionError(
                f"a process of this proof did not end within {self.timeout_seconds:g} s{last}; "
                "if the pipeline does not work in a forked process, pass processes=False"
            )
        if code == -signal.SIGKILL and life.boundaries:
            life.died = life.boundaries[-1]
        elif not life.status:
            raise AssertionError(
                f"a process of this proof exited with code {code}; see stderr. If the pipeline does not "
                "work in a forked process, pass processes=False"
            )
        return life

    def _run_child(self, writing: int, run_id: str, resume: bool, die_at: Boundary | None) -> None:
        """Run in a child process, report, and exit without cleanup of the parent."""
        code = 1
        # Or each full collection copies all memory that it shares with the parent: twice the time.
        gc.freeze()
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if FakeClock._active is not None:
                FakeClock._active._outside = 0  # The child must not wait for operations of the parent.

            def report(what: str, of: Any) -> None:
                os.write(writing, json.dumps([what, of]).encode() + b"\n")

            life = ProcessRecord()
            deaths = Deaths(lambda boundary: boundary == die_at, life=life, kill=True, report=report)
            asyncio.run(self._run(run_id, resume, deaths, life))
            report("met", [plan.met_faults() for plan in _plans()])
            report("end", [life.status, life.failure, life.state, life.effects, self.rehearsal.places])
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


def _plans() -> list[FaultPlan]:
    return [interceptor for interceptor in INTERCEPTORS if isinstance(interceptor, FaultPlan)]


def _listen(child: int, reading: int, timeout_seconds: float) -> tuple[str, int | None]:
    """Return the output and exit code of a child, None after a timeout. The child is dead afterwards."""
    written = b""
    ended = False
    deadline = time.monotonic() + timeout_seconds
    try:
        while (remaining := deadline - time.monotonic()) > 0:
            if not select.select([reading], [], [], remaining)[0]:
                break
            data = os.read(reading, 65536)
            if not data:
                ended = True
                break
            written += data
    finally:
        os.close(reading)
        if not ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return written.decode(), os.waitstatus_to_exitcode(status) if ended else None
