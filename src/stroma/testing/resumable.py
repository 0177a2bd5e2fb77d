"""assert_resumable: let a process die at each boundary of a run in turn, and resume it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import json
import os
import select
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from stroma.checkpoint import CheckpointManager
from stroma.checkpoint.history import Change, changes, place_of
from stroma.checkpoint.records import AttemptRecord
from stroma.checkpoint.sqlite.store import SQLiteStore
from stroma.contracts.node import Group, Node, find_node
from stroma.contracts.schema import Schema, schema_of
from stroma.engine.context import ReliabilityContext
from stroma.engine.interceptors import PROBES
from stroma.failures.failure import text_of
from stroma.runner.pipeline import Pipeline
from stroma.runner.runner import StromaRunner
from stroma.testing.clock import FakeClock
from stroma.testing.crash import Boundary, Crashed, Deaths
from stroma.testing.faults import FaultPlan
from stroma.trace.plain import jsonable
from stroma.trace.result import RunStatus

__all__ = ["Resumability", "assert_resumable", "assert_resumable_sync"]

#: Code under test: a pipeline, its nodes, or plain code with steps.
Proven = Pipeline | Iterable[Any] | Callable[[ReliabilityContext, Any], Awaitable[BaseModel]]

_COMPLETED: Final = (RunStatus.COMPLETED, RunStatus.RESUMED)


@dataclass(frozen=True, slots=True)
class Resumability:
    """Result of :func:`assert_resumable`.

    Attributes:
        boundaries: where a process died, each in a run of its own.
        killed: whether that was a SIGKILL to a process, and not a simulated death.
    """

    boundaries: tuple[Boundary, ...]
    killed: bool


@dataclass(slots=True)
class _Life:
    """Record of one process."""

    boundaries: list[Boundary] = field(default_factory=list)
    committed: list[tuple[int, str]] = field(default_factory=list)
    died: bool = False
    status: str = ""
    failure: str | None = None
    state: Any = None
    effects: Any = None


@dataclass(slots=True)
class _Trial:
    """Settings of a proof: pipeline, store, and whether processes are real."""

    proven: Any
    state: BaseModel
    runner: StromaRunner
    path: Path
    processes: bool
    effects: Callable[[], Any] | None
    reset: Callable[[], Any] | None
    timeout_seconds: float

    def fresh(self) -> None:
        """Reset everything outside of the pipeline."""
        if self.reset is not None:
            self.reset()

    async def live(self, run_id: str, *, resume: bool, die_at: Boundary | None = None) -> _Life:
        if not self.processes:
            life = _Life()
            deaths = Deaths(lambda boundary: boundary == die_at)
            await self._run(run_id, resume, deaths, life)
            life.boundaries, life.committed = deaths.life.boundaries, deaths.life.committed
            return life
        return await self._in_child(run_id, resume, die_at)

    async def _run(self, run_id: str, resume: bool, deaths: Deaths, life: _Life) -> None:
        store = SQLiteStore(self.path, synchronous="normal")
        PROBES.insert(0, deaths)
        clock = contextlib.nullcontext() if FakeClock._active is not None else FakeClock()
        try:
            with clock:
                await self._drive(store, run_id, resume, life)
        except Crashed:
            pass
        finally:
            PROBES.remove(deaths)
            await store.aclose()
        # Plain code can have caught Crashed, or raised what its next step came to after the death.
        life.died = deaths.life.died is not None
        if self.effects is not None and not life.died:
            life.effects = jsonable(self.effects())

    async def _drive(self, store: SQLiteStore, run_id: str, resume: bool, life: _Life) -> None:
        config = self.runner._config_of(self.proven)
        try:
            context = copy.deepcopy(config.context)
        except Exception:  # It holds a client, say.
            context = dict(config.context)
        changed: dict[str, Any] = {
            "run_id": run_id, "resume": resume, "resume_from": None, "if_exists": "restart", "context": context,
            "shared_budgets": (),
        }  # fmt: skip
        config = config.model_copy(update=changed)
        manager = CheckpointManager(store)
        state = schema_of(type(self.state)).copy(self.state)
        proven = self.proven
        if inspect.iscoroutinefunction(proven):
            ctx = ReliabilityContext.for_run(config, self.runner.registry, manager)
            try:
                async with ctx:
                    final = await proven(ctx, state)
                life.status = RunStatus.COMPLETED
                life.state = _plain(final)
            except Exception as error:
                life.status, life.failure = RunStatus.FAILED, f"{type(error).__name__}: {error}"
            return
        twin = StromaRunner(self.runner.registry, manager, config)
        try:
            result = await twin.run(proven, state)
        except Exception as error:  # StoreError, when it is opened: PipelineChanged, say.
            life.status, life.failure = RunStatus.FAILED, f"{type(error).__name__}: {error}"
            return
        life.status = result.status
        if result.failure is not None:
            life.failure = f"node {result.failure.node_id!r}: {text_of(result.failure)}"
        life.state = None if result.final_state is None else _plain(result.final_state)

    # ------------------------------------------------------------------ processes

    async def _in_child(self, run_id: str, resume: bool, die_at: Boundary | None) -> _Life:
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            # Of threads that the child will not have; it asks nothing of them.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:  # pragma: no cover - it ends without telling the measurement.
            os.close(reading)
            self._run_child(writing, run_id, resume, die_at)
        os.close(writing)
        # In a thread, so that a server on this event loop can answer the child.
        text, code = await asyncio.to_thread(_listen, child, reading, self.timeout_seconds)
        life = _Life()
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
                life.status, life.failure, life.state, life.effects = of
        if code is None:
            last = f"; the last it told is: {life.boundaries[-1]}" if life.boundaries else ""
            raise AssertionError(
                f"a process of this proof did not end within {self.timeout_seconds:g} s{last}; if the pipeline does not "
                "work in a forked process, pass processes=False"
            )
        life.died = code == -signal.SIGKILL
        if not life.died and not life.status:
            raise AssertionError(
                f"a process of this proof exited with code {code}; see stderr. If the pipeline does not "
                "work in a forked process, pass processes=False"
            )
        return life

    def _run_child(self, writing: int, run_id: str, resume: bool, die_at: Boundary | None) -> None:
        """Run in a child process, report, and exit without cleanup of the parent."""
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if FakeClock._active is not None:
                FakeClock._active._outside = 0  # The child must not wait for operations of the parent.

            def report(what: str, of: Any) -> None:
                os.write(writing, json.dumps([what, of]).encode() + b"\n")

            life = _Life()
            deaths = Deaths(lambda boundary: boundary == die_at, kill=True, report=report)
            asyncio.run(self._run(run_id, resume, deaths, life))
            report("met", [plan.met_faults() for plan in _plans()])
            report("end", [life.status, life.failure, life.state, life.effects])
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)


def _plans() -> list[FaultPlan]:
    """Context manager for the fault plans of a test."""
    return [probe for probe in PROBES if isinstance(probe, FaultPlan)]


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


def _plain(state: BaseModel) -> Any:
    """Return a state as plain JSON data."""
    return jsonable(Schema.decode_raw(schema_of(type(state)).encode(state)))


# ---------------------------------------------------------------------- the proof


async def assert_resumable(
    pipeline: Proven,
    state: BaseModel,
    *,
    runner: StromaRunner | None = None,
    ignore: Collection[str] = (),
    effects: Callable[[], Any] | None = None,
    reset: Callable[[], Any] | None = None,
    processes: bool | None = None,
    most: int = 200,
    timeout_seconds: float = 60.0,
) -> Resumability:
    """Prove that a pipeline survives the death of its process, at every boundary of its run.

    It is run once without a disturbance. Then, for every boundary of that run (see ``crash_at``), a process runs it and
    dies there, and another one goes on with it. Nothing that had finished may be called again, and the final state must be
    the one of the undisturbed run, as must be what maps write to files or the journal. Each process uses a SQLite file of its own; waits are jumped over as by FakeClock.

    ``pipeline``: a Pipeline, its nodes, or plain code: an async function of ``(ctx, state)`` that calls ``execute_step``.
    ``runner``: whose config and contracts count; the store is ours. Shared budgets are left out. ``ignore``: fields of the
    final state that may differ, such as ``"made_at"``, ``"lines.0"``.

    ``processes``: whether each process is a real one, forked from this and killed with SIGKILL: then whatever a node keeps
    in memory is lost, as it would be (but not what this process holds in memory already: a global that an earlier test has
    filled hides that it is needed). That is so by default where there is a fork, unless ``effects`` is given.
    ``effects``: gives what the pipeline has done to the world, a list of mails sent say, as plain data; it must be the same
    as after the undisturbed run. A node that dies after its work and before its commit is called again, so work that must
    be done once has to go by ``current_node().idempotency_key``. ``reset``: called before each run, to make the world
    anew. With ``processes=True`` both must look at what processes share: files, a server.

    ``most``: how many boundaries are tried, spread over the run. ``timeout_seconds``: for each process.

    Raises AssertionError that names the node and the boundary.
    """
    if not isinstance(pipeline, Pipeline) and not inspect.iscoroutinefunction(pipeline):
        if not isinstance(pipeline, Iterable):
            raise TypeError(
                f"{pipeline!r} cannot be run; pass a Pipeline, a list of nodes, or an async function of (ctx, state)"
            )
        pipeline = list(pipeline)
    if processes is None:
        processes = hasattr(os, "fork") and effects is None
    elif processes and not hasattr(os, "fork"):
        raise ValueError("processes=True needs fork(); remove it on this system")
    with tempfile.TemporaryDirectory(prefix="stroma-resumable-") as directory:
        trial = _Trial(
            pipeline, state, runner or StromaRunner.quick(), Path(directory, "runs.db"), processes, effects, reset,
            timeout_seconds,
        )  # fmt: skip
        ignored = tuple(ignore)
        first, again = [await _undisturbed(trial, run_id) for run_id in ("undisturbed", "undisturbed-2")]
        differs = _differences(first, again, ignored) or _map_difference(
            trial, "undisturbed", "undisturbed-2", ignored
        )
        if differs:
            where = _first_difference(trial, "undisturbed", "undisturbed-2", ignored)
            raise AssertionError(
                f"two undisturbed runs differ{where}: {differs}; give the nodes the same responses each time (a recording, a seed), "
                "keep nothing outside of states, or name fields that may differ with ignore="
            )
        boundaries = _some(list(dict.fromkeys(first.boundaries)), most)
        for number, boundary in enumerate(boundaries):
            await _try(trial, f"run-{number}", boundary, first, ignored)
    return Resumability(tuple(boundaries), processes)


def assert_resumable_sync(pipeline: Proven, state: BaseModel, **options: Any) -> Resumability:
    """Call :func:`assert_resumable` without an event loop. Raises RuntimeError if one is running."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(assert_resumable(pipeline, state, **options))
    raise RuntimeError("an event loop is running here; use `await assert_resumable(...)`")


async def _undisturbed(trial: _Trial, run_id: str) -> _Life:
    trial.fresh()
    life = await trial.live(run_id, resume=False)
    if life.status not in _COMPLETED:
        raise AssertionError(
            f"the undisturbed run does not complete: it ends as {life.status or 'a process that died'}"
            + (f", {life.failure}" if life.failure else "")
        )
    return life


async def _try(
    trial: _Trial, run_id: str, boundary: Boundary, undisturbed: _Life, ignore: tuple[str, ...]
) -> None:
    trial.fresh()
    died = await trial.live(run_id, resume=False, die_at=boundary)
    what = f"not resumable: the process dies {boundary}"
    if not died.died:
        raise AssertionError(
            f"this run never reached the boundary {str(boundary)!r}, but the undisturbed one did: its path depends on "
            "something outside of its input; let nodes decide by their input alone"
        )
    life = await trial.live(run_id, resume=True)
    called = {(b.position, b.branch): b for b in life.boundaries if b.point == "before_node"}
    twice = [called[place] for place in dict.fromkeys(died.committed) if place in called]
    if twice:
        raise AssertionError(f"{what}; node {twice[0].node_id!r} had finished, and was called again")
    if life.status not in _COMPLETED:
        raise AssertionError(
            f"{what}; the resumed run ends as {life.status or 'a process that died'}"
            + (f", {life.failure}" if life.failure else "")
            + "; what a node needs must come with its input or the run's context, not from the memory of the process"
        )
    difference = _describe_changes(changes(undisturbed.state, life.state), ignore)
    item = "" if difference else _map_difference(trial, "undisturbed", run_id, ignore)
    if item:
        raise AssertionError(
            f"{what}; an item outside of the state differs: {item}; what a node needs must come with its "
            "input or the run's context, not from the memory of the process"
        )
    if difference:
        where = _first_difference(trial, "undisturbed", run_id, ignore)
        raise AssertionError(
            f"{what}; the final state differs{where}: {difference}; what a node needs must come with its input or the "
            "run's context, not from the memory of the process"
        )
    done = _describe_changes(changes(undisturbed.effects, life.effects), ())
    if done:
        again = boundary.node_id if boundary.point == "after_node" else ""
        mend = f": node {again!r} did its work, and was called again" if again else ""
        raise AssertionError(
            f"{what}; its effects differ{mend}: {done}; let the other side drop duplicates by "
            "current_node().idempotency_key"
        )


def _differences(a: _Life, b: _Life, ignore: tuple[str, ...]) -> str:
    difference = _describe_changes(changes(a.state, b.state), ignore) or _describe_changes(
        changes(a.effects, b.effects), ()
    )
    if difference:
        return difference
    steps = [
        [(s.node_id, s.position, s.branch, s.attempt) for s in sorted(life.boundaries)] for life in (a, b)
    ]
    if steps[0] != steps[1]:
        other = next(iter({*steps[0]} ^ {*steps[1]}))
        return f"attempt {other[3]} of node {other[0]!r} is in one of them only"
    return ""


def _describe_changes(difference: list[Change], ignore: tuple[str, ...]) -> str:
    """Describe the first differences that count; "" if there are none."""
    counted = [
        c for c in difference if not any(c.path == path or c.path.startswith(f"{path}.") for path in ignore)
    ]
    descriptions = [
        f"{change.path or 'the value'} {_short(change.a)} -> {_short(change.b)}" if change.kind == "changed"
        else f"{change.path} {change.kind}"
        for change in counted[:3]
    ]  # fmt: skip
    return "; ".join(descriptions) + (f"; and {len(counted) - 3} more" if len(counted) > 3 else "")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _first_difference(trial: _Trial, a: str, b: str, ignore: tuple[str, ...]) -> str:
    """Describe the first node at which two runs differ."""
    for one, _ in _differing_outputs(trial, a, b, ignore):
        return f", from the output of node {one.node_id!r} (position {place_of(one)}) on"
    return ""


def _map_difference(trial: _Trial, a: str, b: str, ignore: tuple[str, ...]) -> str:
    """Describe the first differing output of a map that is not part of a state; "" if there is none."""
    proven = trial.proven.nodes if isinstance(trial.proven, Pipeline) else trial.proven
    nodes = [] if inspect.iscoroutinefunction(proven) else [find_node(node) for node in proven]
    maps = [place for position, node in enumerate(nodes) for place in _external_maps(node, str(position))]
    if maps:
        for one, difference in _differing_outputs(trial, a, b, ignore):
            if any(place_of(one).startswith(f"{place}.") for place in maps):
                return f"{difference} at node {one.node_id!r} (position {place_of(one)})"
    return ""


def _external_maps(node: Node | Group, place: str) -> Iterator[str]:
    """Return the places of maps whose outputs are not part of the state."""
    if not isinstance(node, Group):
        return
    if node.is_map:
        if not node.output_field:
            yield place
        return
    for index, child in enumerate(node.children):
        yield from _external_maps(child, f"{place}.{index}")


def _differing_outputs(
    trial: _Trial, a: str, b: str, ignore: tuple[str, ...]
) -> Iterator[tuple[AttemptRecord, str]]:
    """Return the first different committed output of two runs, in order of places, with a description."""
    with SQLiteStore(trial.path) as store:
        outputs = [
            {(x.position, x.branch): x for x in store.attempts(run_id) if x.output is not None}
            for run_id in (a, b)
        ]
    for place in sorted(outputs[0].keys() & outputs[1].keys()):
        one, other = outputs[0][place], outputs[1][place]
        assert one.output is not None
        assert other.output is not None
        raw = [jsonable(Schema.decode_raw(data)) for data in (one.output, other.output)]
        difference = _describe_changes(changes(*raw), ignore)
        if difference:
            yield one, difference


def _some(boundaries: list[Boundary], most: int) -> list[Boundary]:
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most!r}")
    if len(boundaries) <= most:
        return boundaries
    step = len(boundaries) / most
    return [boundaries[int(number * step)] for number in range(most)]
