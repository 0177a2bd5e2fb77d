"""The demo, as a newcomer runs it: in a process of its own, with an empty home."""

import os
import re
import sqlite3
import sys
from pathlib import Path

import pytest
from tests.cli.terminal import Emulator, run_on_terminal
from tests.kit import environment, run_python

from stroma.demo.pipeline import DOCUMENTS

pytestmark = pytest.mark.timeout(90)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Emulator, Path]:
    """The demo on a terminal of 80 columns: its exit code, what the terminal shows, and the folder."""
    folder = tmp_path_factory.mktemp("demo")
    home = tmp_path_factory.mktemp("home")
    command = [sys.executable, "-m", "stroma", "demo", "--dir", "work"]
    env = {**os.environ, "HOME": str(home), "OPENAI_API_KEY": "must not be used"}
    env.pop("STROMA_PROGRAM", None)
    code, emulator, _ = run_on_terminal(command, folder, env, rows=30, seconds=80)
    return code, emulator, folder / "work"


@pytest.mark.example
def test_it_goes_as_announced(shown: tuple[int, Emulator, Path]) -> None:
    """`stroma demo` needs no key, ends with 0, and its scenes do what they say, in at most 25 lines."""
    code, emulator, work = shown
    text = emulator.text
    assert code == 0, text
    assert "Traceback" not in text
    for title in ("1. Trouble and retries", "2. Killed and resumed", "3. The budget holds"):
        assert title in text
    assert "kill -9:" in text
    assert re.search(r"\b0 of these \d+ were sent again", text)
    assert "Exit code 5" in text
    report = (work / "stroma-report.md").read_text(encoding="utf-8")
    assert all(path.name in report for path in DOCUMENTS.iterdir())
    scenes = re.split(r"\n(?=\$ stroma r)", text)[1:]
    assert len(scenes) == 4
    for scene in scenes:
        assert len(scene.split("\n\n")[1].splitlines()) <= 25, scene


def test_nothing_wraps(shown: tuple[int, Emulator, Path]) -> None:
    """On 80 columns the terminal breaks no line but that of a folder with a long name."""
    _, emulator, work = shown
    lines = emulator.text.splitlines()
    long = f"export STROMA_DB={work / 'runs.db'}"
    assert emulator.wrapped == (len(long) - 1) // 80
    assert not [line for line in lines if re.search(r"\$\d*\.?\d{0,5}$", line)], emulator.text


def test_each_document_has_its_cost(shown: tuple[int, Emulator, Path]) -> None:
    """The bill has a line for each document, and the commands below it work as they are printed."""
    _, emulator, work = shown
    text = emulator.text
    bill = text[text.index("What each document has cost") :]
    for path in DOCUMENTS.iterdir():
        assert re.search(
            rf"^{re.escape(path.name[:30])}.* +[\d,]+ +\$0\.\d{{6}}  .*(ok|…)$", bill, re.MULTILINE
        ), bill
    commands = [line for line in bill.splitlines() if line.startswith("stroma ")]
    assert [words.split()[1] for words in commands] == ["show", "runs", "ui", "run"]
    for words in commands[:2]:
        run_python("-m", *words.split(), env=environment(STROMA_DB=work / "runs.db"))


def test_every_kind_of_trouble_is_seen(shown: tuple[int, Emulator, Path]) -> None:
    """Rate limits, server errors, a hang, a dropped connection, broken contracts and the budget are met."""
    _, emulator, _ = shown
    for reason in ("rate_limit", "server_error", "overloaded", "timeout", "connection", "contract", "budget"):
        assert reason in emulator.text, reason


def test_nothing_finished_is_done_twice(shown: tuple[int, Emulator, Path]) -> None:
    """G5: over the kill and the resume, each position of the run was committed exactly once."""
    _, _, work = shown
    with sqlite3.connect(work / "runs.db") as db:
        rows = db.execute(
            "SELECT s.position, s.branch, count(*) FROM steps s JOIN runs USING (run) WHERE run_id = 'killed'"
            " AND s.position >= 0 GROUP BY s.position, s.branch"
        ).fetchall()
        succeeded = db.execute(
            "SELECT count(*) FROM attempts JOIN runs USING (run) WHERE run_id = 'killed' AND outcome = "
            "'success'"
        ).fetchone()[0]
    documents = sum(1 for _ in DOCUMENTS.iterdir())
    # read, the map and its items, check, the parallel and its two children, report
    assert len(rows) == 1 + 1 + documents + 1 + 3 + 1
    assert all(count == 1 for _, _, count in rows)
    assert succeeded == len(rows)


def test_a_killed_agent_pays_once(tmp_path: Path) -> None:
    """`stroma demo agent`, without a key or network: killed while it pays, it resumes and charges once."""
    command = [sys.executable, "-m", "stroma", "demo", "agent", "--dir", "work"]
    env = {**os.environ, "HOME": str(tmp_path)}
    env.pop("STROMA_PROGRAM", None)
    code, emulator, _ = run_on_terminal(command, tmp_path, env, rows=30, seconds=60)
    text = emulator.text
    assert code == 0, text
    assert "Traceback" not in text
    assert "Its book has 1 booking" in text
    assert "asked 3 times in three processes: no request was repeated" in text
    assert len((tmp_path / "work" / "bank.jsonl").read_text("utf-8").splitlines()) == 1
