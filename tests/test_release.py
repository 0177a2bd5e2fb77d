"""What `./dev release-check` refuses."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from tests.release.archives import LARGEST_FILE, disagreement, leaks, wrong_contents

OPEN = "## [Unreleased]\n\n### Added\n\n- A thing.\n"
DONE = f"{OPEN}\n## [0.4.0] - 2026-12-01\n\n### Added\n\n- Another.\n\n## [0.3.2] - 2026-01-01\n"


@pytest.mark.parametrize(
    ("version", "changelog", "tags", "wrong"),
    [
        ("0.4.0.dev0", OPEN, [], None),
        ("0.4.0.dev0", DONE, [], "has 0.4.0 released"),
        ("0.4.0.dev0", OPEN, ["v0.4.0"], "on a development version"),
        ("0.4.0.dev0", "# Changelog\n", [], "has no section [Unreleased]"),
        ("0.4.0", DONE, ["v0.4.0"], None),
        ("0.4.0", DONE, [], None),
        ("0.4.0", DONE, ["v0.4.1"], "the tag v0.4.1 is on version 0.4.0"),
        ("0.4.1", DONE, [], "has no section [0.4.1]"),
        ("0.3.2", DONE, [], "is not the newest section"),
        ("0.4.0", DONE.replace(" - 2026-12-01", ""), [], "has no date for [0.4.0]"),
    ],
)
def test_version_changelog_and_tag_agree(
    version: str, changelog: str, tags: list[str], wrong: str | None
) -> None:
    """A version without its section, a section without its date, a tag on another version: each is told."""
    found = disagreement(version, changelog, tags)
    assert (found == []) if wrong is None else any(wrong in line for line in found), found


def test_an_address_of_one_machine_is_found() -> None:
    """The file and the text are named."""
    files = {"a.txt": b"fine", "b.txt": b"from index.example.internal, which is not public"}
    assert leaks(files, ["index.example.internal"]) == ["b.txt has 'index.example.internal' in it"]
    assert leaks(files, ["another.example.internal"]) == []


def test_a_wheel_that_lacks_something_or_has_too_much(tmp_path: Path) -> None:
    """Missing files, files of a machine, files beside the package and large ones are each named."""
    path = tmp_path / "stroma-0.4.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("stroma/__init__.py", "")
        wheel.writestr("tests/test_x.py", "")
        wheel.writestr("stroma/runs.db", "x")
        wheel.writestr("stroma/model.bin", "x" * (LARGEST_FILE + 1))
    told = "\n".join(wrong_contents(path))
    for part in (
        "has no stroma/py.typed",
        "has no licence",
        "tests/test_x.py",
        "stroma/runs.db",
        "stroma/model.bin",
    ):
        assert part in told
