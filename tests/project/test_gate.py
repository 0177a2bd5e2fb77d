"""The gate for what Stroma costs (benchmarks/gate.py): what it decides, not what it measures."""

import json
import shutil
from pathlib import Path

from benchmarks import gate, hooks


def test_the_gate_lets_pass_what_is_within_its_slack() -> None:
    """A quarter more is too much, a tenth more is not."""
    assert gate.above(2.0 * 1.25, 2.0)
    assert not gate.above(2.0 * 1.1, 2.0)


def test_each_case_of_the_gate_has_its_figure() -> None:
    """A case that nobody wrote a figure down for would be no gate."""
    entry = json.loads(Path(gate.__file__).with_name("gate.json").read_text())
    assert entry
    for python, figures in entry.items():
        assert list(figures) == [case.name for case in gate.cases()], python


def test_every_question_about_hooks_is_found(tmp_path: Path) -> None:
    """`benchmarks.hooks --unset` finds what a run without hooks asks about them, in each file that does."""
    package = tmp_path / "stroma"
    shutil.copytree(hooks.SOURCE / "engine", package / "engine", ignore=shutil.ignore_patterns("__pycache__"))
    assert hooks.strip_questions(package) >= 10
    for path in package.rglob("*.py"):
        compile(path.read_text(), str(path), "exec")
