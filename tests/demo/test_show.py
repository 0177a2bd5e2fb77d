"""The demo, as a newcomer runs it: in a process of its own, with an empty home."""

import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from stroma.demo.pipeline import DOCUMENTS

pytestmark = pytest.mark.timeout(90)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    work = tmp_path_factory.mktemp("demo") / "work"
    home = tmp_path_factory.mktemp("home")
    done = subprocess.run(
        [sys.executable, "-m", "stroma", "demo", "--dir", str(work)],
        env={**os.environ, "HOME": str(home), "OPENAI_API_KEY": "must not be used"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done, work


@pytest.mark.example
def test_it_goes_as_announced(shown: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """`stroma demo` needs no key, ends with 0, and each of its acts did what it says."""
    done, work = shown
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout
    assert "kill -9:" in done.stdout
    assert re.search(r"\b0 of them were sent again", done.stdout)
    assert "Exit code 5" in done.stdout
    assert "Exit code 1" in done.stdout
    report = (work / "report.md").read_text(encoding="utf-8")
    assert all(path.name in report for path in DOCUMENTS.iterdir())


def test_every_kind_of_trouble_is_seen(shown: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """Rate limits, server errors, a hang, a dropped connection, broken contracts and a used-up quota are met."""
    done, _ = shown
    for reason in (
        "rate_limit",
        "server_error",
        "overloaded",
        "timeout",
        "connection",
        "contract",
        "quota",
        "budget",
    ):
        assert reason in done.stdout, reason


def test_nothing_finished_is_done_twice(shown: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """G5: over the kill and the resume, each position of the run was committed exactly once."""
    _, work = shown
    with sqlite3.connect(work / "runs.db") as db:
        rows = db.execute(
            "SELECT s.position, s.branch, count(*) FROM steps s JOIN runs USING (run) WHERE run_id = 'inbox'"
            " AND s.position >= 0 GROUP BY s.position, s.branch"
        ).fetchall()
        succeeded = db.execute(
            "SELECT count(*) FROM attempts JOIN runs USING (run) WHERE run_id = 'inbox' AND outcome = 'success'"
        ).fetchone()[0]
    documents = sum(1 for _ in DOCUMENTS.iterdir())
    # read, the map and its items, check, the parallel and its two children, report
    assert len(rows) == 1 + 1 + documents + 1 + 3 + 1
    assert all(count == 1 for _, _, count in rows)
    assert succeeded == len(rows)
