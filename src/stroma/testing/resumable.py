"""assert_resumable: let a process die at each boundary of a run in turn, and resume it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from stroma.checkpoint.history.bars import place_of
from stroma.checkpoint.history.comparison import Change, changes
from stroma.checkpoint.records import AttemptRecord
from stroma.checkpoint.sqlite.store import SQLiteStore
from stroma.contracts.codec import decode_raw
from stroma.contracts.node import apart_in, find_node
from stroma.runner.pipeline import Pipeline
from stroma.runner.rehearsal import Answers, Rehearsal
from stroma.runner.runner import StromaRunner
from stroma.testing.blocking import blocking_form_of
from stroma.testing.crash import Boundary
from stroma.testing.resume_trial import ProcessRecord, Trial
from stroma.trace.plain import jsonable
from stroma.trace.result import RunStatus

_COMPLETED: Final = (RunStatus.COMPLETED, RunStatus.RESUMED)
_NEEDS: Final = (
    "what a node needs must come with its input or the run's context, not from the memory of the process"
)


@dataclass(frozen=True, slots=True)
class Resumability:
    """Result of :func:`assert_resumable`.

    Attributes:
        boundaries: boundaries at which a process died, each in its own run.
        killed: True for SIGKILL, False for simulated deaths.
    """

    boundaries: tuple[Boundary, ...]
    killed: bool


# ---------------------------------------------------------------------- the proof


async def assert_resumable(
    pipeline: Pipeline | Iterable[Any],
    state: BaseModel,
    *,
    runner: StromaRunner[Any] | None = None,
    answers: Answers = (),
    messages: Sequence[Any] = (),
    ignore: Collection[str] = (),
    effects: Callable[[], Any] | None = None,
    reset: Callable[[], Any] | None = None,
    processes: bool | None = None,
    most: int = 200,
    timeout_seconds: float = 60.0,
) -> Resumability:
    """Prove that a pipeline survives the death of its process, at every boundary of its run.

    The pipeline is run twice without a death: both runs must be equal. Then, for every boundary of that run
    (see ``crash_at``), a process runs it and dies there, and another one resumes it. No committed node may be
    called again, and the final state must be that of the undisturbed run, as must the outputs that maps write
    to files or the journal. All runs share one temporary SQLite file; waits take no time, as under FakeClock.

    ``pipeline``: a Pipeline, a flow, or nodes.
    ``runner``: source of config and contracts; its store is replaced, and shared budgets are skipped. A
        context is passed with it: ``runner=StromaRunner.quick(context=...)``.
    ``answers``, ``messages``: what a run that waits gets, see :meth:`StromaRunner.check_deterministic`.
    ``ignore``: fields of the final state that may differ, such as ``"made_at"``, ``"lines.0"``.

    ``processes``: True forks each process and kills it with SIGKILL, so that the memory of nodes is lost.
    Memory that this process has before the fork is not: a global that an earlier test has filled hides that
    it is needed. The default is True where the system has fork(), unless ``effects`` is passed.
    ``effects``: returns the side effects of the pipeline as plain data, such as a list of mails sent; they
    must equal those of the undisturbed run. A node whose process dies after its work and before its commit is
    called again, so work that must be done once needs ``effect=True`` and ``reconcile=``, or
    ``current_node().idempotency_key``. ``reset``: called before each run, to remove side effects. With
    ``processes=True`` both must use data that processes share: files, a server.

    ``most``: maximum number of boundaries, spread over the run. ``timeout_seconds``: limit for each process.

    Raises AssertionError that names the node and the boundary.
    """
    proven = pipeline if isinstance(pipeline, Pipeline) else list(pipeline)  # It is run many times.
    forks = _uses_processes(processes, effects)
    with tempfile.TemporaryDirectory(prefix="stroma-resumable-") as directory:
        trial = Trial(
            proven,
            state,
            runner or StromaRunner.quick(),
            Path(directory, "runs.db"),
            forks,
            effects,
            reset,
            timeout_seconds,
            Rehearsal(answers, messages),
        )
        ignored = tuple(ignore)
        undisturbed = await _undisturbed_twice(trial, ignored)
        boundaries = _some(list(dict.fromkeys(undisturbed.boundaries)), most)
        for number, boundary in enumerate(boundaries):
            await _try(trial, f"run-{number}", boundary, undisturbed, ignored)
    return Resumability(tuple(boundaries), forks)


def _uses_processes(processes: bool | None, effects: Callable[[], Any] | None) -> bool:
    has_fork = hasattr(os, "fork")
    if processes is None:
        return has_fork and effects is None
    if processes and not has_fork:
        raise ValueError("processes=True needs fork(); remove it on this system")
    return processes


@blocking_form_of(assert_resumable)
def assert_resumable_sync() -> None:
    """Call :func:`assert_resumable`, with its arguments, without an event loop.

    Raises RuntimeError if one is running.
    """


async def _undisturbed_twice(trial: Trial, ignored: tuple[str, ...]) -> ProcessRecord:
    """Run twice undisturbed and return the first record. Raises AssertionError if the runs differ."""
    names = "undisturbed", "undisturbed-2"
    first, again = [await _undisturbed(trial, run_id) for run_id in names]
    differs = _differences(first, again, ignored) or _map_difference(trial, *names, ignored)
    if differs:
        where = _first_difference(trial, *names, ignored)
        raise AssertionError(
            f"two undisturbed runs differ{where}: {differs}; give the nodes the same responses each time "
            "(a recording, a seed), keep nothing outside of states, or pass what may differ as ignore="
        )
    effects = _describe_changes(changes(first.effects, again.effects), ())
    if effects:
        raise AssertionError(
            f"two undisturbed runs have different effects: {effects}; return nothing from effects= that is "
            "new in each run, such as an idempotency key"
        )
    return first


async def _undisturbed(trial: Trial, run_id: str) -> ProcessRecord:
    trial.fresh()
    life = await trial.live(run_id, resume=False)
    if life.status not in _COMPLETED:
        raise AssertionError(f"the undisturbed run does not complete: it {life.how_it_ended}")
    return life


async def _try(
    trial: Trial, run_id: str, boundary: Boundary, undisturbed: ProcessRecord, ignore: tuple[str, ...]
) -> None:
    trial.fresh()
    died = await trial.live(run_id, resume=False, die_at=boundary)
    what = f"not resumable: the process dies {boundary}"
    if not died.died:
        raise AssertionError(
            f"this run never reached the boundary {str(boundary)!r}, but the undisturbed one did: its path "
            "depends on something outside of its input; let nodes decide by their input alone"
        )
    life = await trial.live(run_id, resume=True)
    called = {(b.position, b.branch): b for b in life.boundaries if b.point == "before_node"}
    twice = [called[place] for place in dict.fromkeys(died.committed) if place in called]
    if twice:
        raise AssertionError(f"{what}; node {twice[0].node_id!r} had finished, and was called again")
    if life.status not in _COMPLETED:
        needs = "" if life.status == RunStatus.SUSPENDED else f"; {_NEEDS}"
        raise AssertionError(f"{what}; the resumed run {life.how_it_ended}{needs}")
    difference = _describe_changes(changes(undisturbed.state, life.state), ignore)
    item = "" if difference else _map_difference(trial, "undisturbed", run_id, ignore)
    if item:
        raise AssertionError(f"{what}; an item outside of the state differs: {item}; {_NEEDS}")
    if difference:
        where = _first_difference(trial, "undisturbed", run_id, ignore)
        raise AssertionError(f"{what}; the final state differs{where}: {difference}; {_NEEDS}")
    done = _describe_changes(changes(undisturbed.effects, life.effects), ())
    if done:
        again = boundary.node_id if boundary.point == "after_node" else ""
        cause = f": node {again!r} did its work, and was called again" if again else ""
        raise AssertionError(
            f"{what}; its effects differ{cause}: {done}; pass effect=True and reconcile=, "
            "or let the other side drop duplicates by current_node().idempotency_key"
        )


def _differences(a: ProcessRecord, b: ProcessRecord, ignore: tuple[str, ...]) -> str:
    difference = _describe_changes(changes(a.state, b.state), ignore)
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
        f"{change.path or 'the value'} {' -> '.join(change.texts(80))}"
        if change.kind == "changed"
        else f"{change.path} {change.kind}"
        for change in counted[:3]
    ]
    return "; ".join(descriptions) + (f"; and {len(counted) - 3} more" if len(counted) > 3 else "")


def _first_difference(trial: Trial, a: str, b: str, ignore: tuple[str, ...]) -> str:
    """Describe the first node at which two runs differ."""
    for one, _ in _differing_outputs(trial, a, b, ignore):
        return f", from the output of node {one.node_id!r} (position {place_of(one)}) on"
    return ""


def _map_difference(trial: Trial, a: str, b: str, ignore: tuple[str, ...]) -> str:
    """Describe the first differing output of a map that is not part of a state; "" if there is none."""
    proven = trial.proven.nodes if isinstance(trial.proven, Pipeline) else trial.proven
    places = apart_in([find_node(node) for node in proven])
    for one, difference in _differing_outputs(trial, a, b, ignore) if places else ():
        if one.branch and any(one.position == at and one.branch.startswith(start) for at, start in places):
            return f"{difference} at node {one.node_id!r} (position {place_of(one)})"
    return ""


def _differing_outputs(
    trial: Trial, a: str, b: str, ignore: tuple[str, ...]
) -> Iterator[tuple[AttemptRecord, str]]:
    """Yield the last attempts that ended differently in two runs, in the order of their ends, each described.

    What calls others ends after them.
    """
    with SQLiteStore(trial.path) as store:
        last, others = [{(x.position, x.branch): x for x in store.attempts(run_id)} for run_id in (a, b)]
    for one in sorted(last.values(), key=lambda x: (x.started_ns + x.duration_ns, -len(x.branch))):
        other = others.get((one.position, one.branch), one)
        ends: list[Any] = [
            x.message if x.output is None else jsonable(decode_raw(x.output)) for x in (one, other)
        ]
        difference = _describe_changes(changes(*ends), ignore)
        if difference:
            yield one, difference


def _some(boundaries: list[Boundary], most: int) -> list[Boundary]:
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most!r}")
    if len(boundaries) <= most:
        return boundaries
    step = len(boundaries) / most
    return [boundaries[int(number * step)] for number in range(most)]
