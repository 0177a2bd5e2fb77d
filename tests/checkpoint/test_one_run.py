"""Three processes open, answer, cancel, fork, collect and delete one run at once, in any order."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from tests.checkpoint.every_record import OF_NO_RUN, contents
from tests.checkpoint.one_run_helper import RUN
from tests.kit import start_python
from tests.shared_stores import SHARED, opened, place
from tests.store_suite.helpers import begin, finish

from stroma.checkpoint.records import RunQuery

Line = dict[str, Any]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "deletes"),
    [(kind, False) for kind in SHARED]
    + [
        pytest.param(kind, True, marks=[] if kind == "redis" else pytest.mark.nightly, id=f"{kind}-deletes")
        for kind in SHARED
    ],
)
async def test_operators_of_one_run(kind: str, deletes: bool, tmp_path: Path) -> None:
    """G5, G10: Whatever processes do to a run at once, no acknowledged commit is lost, one session writes at
    a time, no living owner loses the run, and a deletion leaves nothing."""
    await _round(kind, f"{kind} {deletes}", deletes, 80, tmp_path)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [False, True], ids=["alive", "killed"])
@pytest.mark.parametrize("kind", SHARED)
async def test_many_operators_of_one_run(kind: str, kills: bool, tmp_path: Path) -> None:
    """The same in many rounds, also while the processes are killed with SIGKILL and started anew."""
    for seed in range(4):
        folder = tmp_path / str(seed)
        folder.mkdir()
        await _round(kind, f"{seed}", seed % 2 == 1, 150, folder, kills)


async def _round(kind: str, seed: str, deletes: bool, steps: int, folder: Path, kills: bool = False) -> None:
    with place(kind) as where:
        async with opened(kind, where) as store:
            await finish(await begin(store, "first"))  # Nothing can be read before it.
        processes: list[subprocess.Popen[str]] = []

        def start() -> None:
            diary = folder / f"diary{len(processes)}"
            facts = (kind, where, seed, len(processes), steps, diary, "yes" if deletes else "no")
            processes.append(start_python("-m", "tests.checkpoint.one_run_helper", *facts))

        for _ in range(3):
            start()
        if kills:
            _kill_some(processes, start, random.Random(seed))
        for process in processes:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0 or kills, errors
        lines = _read(folder)
        assert violations(lines, deletes, kills) == []
        assert sum(line["operation"] == "open" for line in lines) > 3
        await _check_what_remains(kind, where, lines, deletes, folder)


def _kill_some(processes: list[subprocess.Popen[str]], start: Any, draw: random.Random) -> None:
    for _ in range(6):
        time.sleep(draw.uniform(0.3, 1.5))
        process = draw.choice(processes)
        if process.poll() is None:
            process.kill()
            start()


def _read(folder: Path) -> list[Line]:
    texts = [text for diary in folder.glob("diary*") for text in diary.read_text().splitlines(keepends=True)]
    # The last line of a process that was killed may be a part of one.
    lines: list[Line] = [json.loads(text) for text in texts if text.endswith("\n")]
    return sorted(lines, key=lambda line: line["until"])


def violations(lines: list[Line], deletes: bool, kills: bool) -> list[tuple[Any, ...]]:
    """Return what a history of operations has that the guarantees exclude."""
    found: list[tuple[Any, ...]] = []
    for line in lines:
        error = line.get("error")
        if error in ("unexpected", "CorruptCheckpoint") or (error == "CheckpointLost" and not deletes):
            found.append(("error", line))
        if line["operation"] == "read messages" and line["numbers"] != sorted(set(line["numbers"])):
            found.append(("messages out of order", line))
    opens = [line for line in lines if line["operation"] == "open"]
    owners = [line for line in opens if line["is_owner"]]
    of_execution: defaultdict[tuple[str, int], list[Line]] = defaultdict(list)
    of_life: defaultdict[str, list[Line]] = defaultdict(list)
    for line in opens:
        of_execution[line["at"][0], line["at"][1]].append(line)
    for line in owners:
        of_life[line["at"][0]].append(line)
    epochs = Counter((line["at"][0], line["at"][2]) for line in owners)
    found += [("two owners of one epoch", epoch) for epoch, count in epochs.items() if count > 1]
    tried = {line["output"] for line in lines if line["operation"] == "commit"}
    if not kills:  # The last commit of a process that was killed is in no diary.
        found += [
            ("a commit of nobody", line) for line in opens if not tried.issuperset(line["commits"].values())
        ]
    for line in lines:
        if not line.get("done") or "at" not in line or line["operation"] == "end a returned run":
            continue
        life, execution, epoch = line["at"]
        if line["operation"] == "commit":
            found += [
                ("a lost commit", line, later)
                for later in of_execution[life, execution]
                if later["at"][2] > epoch and later["commits"].get(line["place"]) != line["output"]
            ]
        if line["operation"] in ("commit", "fail", "suspend", "ask", "end"):
            found += [
                ("a write of a stale session", line, later)
                for later in of_life[life]
                if later["at"][2] > epoch and line["since"] > later["until"]
            ]
    if not kills:
        found += [("taken from a living owner", *pair) for pair in _taken(lines, owners)]
    return found


def _taken(lines: list[Line], owners: list[Line]) -> list[tuple[Line, Line]]:
    """Return pairs of sessions of which the later one has opened the run in spite of a long lease."""
    until: dict[tuple[Any, ...], int] = {}
    for line in lines:
        if line["operation"] == "begin to end" or (line.get("error") and "at" in line):
            until.setdefault(tuple(line["at"]), line["since"])
    return [
        (one, later)
        for one in owners
        for later in owners
        if one["is_long"]
        and (one["at"][0], one["at"][2] + 1) == (later["at"][0], later["at"][2])
        and not later["takes_over"]
        and one["until"] < later["since"]
        and later["until"] < until.get(tuple(one["at"]), later["until"] + 1)
    ]


async def _check_what_remains(kind: str, where: str, lines: list[Line], deletes: bool, folder: Path) -> None:
    async with opened(kind, where) as store:
        runs = store.run_page(RunQuery(), limit=1000).runs
        for run in runs:
            attempts = store.attempts(run.run_id)
            assert run.tokens == sum(one.tokens for one in attempts), run.run_id
            if run.run_id == RUN and not deletes:
                recorded = {one.started_ns for one in attempts}
                assert [
                    line
                    for line in lines
                    if line.get("done") and "start" in line and line["at"][1] == run.execution
                    if line["start"] not in recorded
                ] == []
        session = await begin(store, RUN, if_exists="resume", if_running="take_over", force=True)
        await finish(session)
        for run_id in {RUN, *(run.run_id for run in runs)}:
            await store.delete(run_id)
        remaining = {name.partition(".")[0] for name in contents(kind, where, folder / "no blobs")}
        assert remaining - set(OF_NO_RUN) == set()
