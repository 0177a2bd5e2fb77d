"""What `./dev release-check` refuses."""

import json
import re
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from tests.release import audit, smoke
from tests.release.__main__ import HERE, PROJECT, TOGETHER, names_of
from tests.release.archives import LARGEST_FILE, disagreement, leaks, wrong_contents
from tests.release.provenance import bill_of_materials, statement, wrong_bill

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
def test_version_changelog_and_tag(version: str, changelog: str, tags: list[str], wrong: str | None) -> None:
    """A version without its section, a section without its date, a tag on another version: each is told."""
    result = disagreement(version, changelog, tags)
    assert (result == []) if wrong is None else any(wrong in line for line in result), result


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
        wheel.writestr("stroma_runner-0.4.0.dist-info/METADATA", "")
        wheel.writestr("tests/test_x.py", "")
        wheel.writestr("stroma/runs.db", "x")
        wheel.writestr("stroma/model.bin", "x" * (LARGEST_FILE + 1))
    report = "\n".join(wrong_contents(path))
    for part in (
        "has no stroma/py.typed",
        "has no licence",
        "tests/test_x.py",
        "stroma/runs.db",
        "stroma/model.bin",
    ):
        assert part in report
    assert "METADATA" not in report


def test_each_extra_is_tried() -> None:
    """Each extra has something to try where it is installed, and what `all` needs is pinned."""
    extras = PROJECT["optional-dependencies"]
    assert {name.replace("-", "_") for name in extras} <= {*smoke.CHECKS, *smoke.FRAMEWORKS}
    pinned = names_of((HERE / "newest.txt").read_text())
    needed = {re.split(r"[^\w.-]", line)[0] for name in TOGETHER for line in extras[name]}
    assert len(needed) > 10
    assert needed - {PROJECT["name"]} <= set(pinned)


def test_a_release_with_an_advisory_is_found() -> None:
    """Each pinned release that an advisory is about is named with it; later ones are not."""
    pinned = audit.pins("jinja2==3.1.5 \\\n    --hash=sha256:0\nStarlette[full]==1.3.1\n# redis==1\n")
    assert pinned == [("jinja2", Version("3.1.5")), ("starlette", Version("1.3.1"))]
    assert audit.affected(pinned, audit.advisories()) == ["jinja2 3.1.5: CVE-2025-27516 (affected: <3.1.6)"]
    assert audit.affected(pinned, [audit.Advisory("starlette", "x", SpecifierSet("<1.3"))]) == []


def test_each_listed_advisory_has_a_source() -> None:
    """Every advisory of the list says where it was read; a package fixed in two lines has two ranges."""
    data = json.loads((Path(audit.__file__).parent / "advisories.json").read_text())
    assert all(one["source"].startswith("https://") for one in data["advisories"])
    protobuf = [one.affected for one in audit.advisories() if one.id == "CVE-2026-0994"]
    fits = [[str(v) in spec for spec in protobuf] for v in ("5.29.5", "5.29.6", "6.33.4", "6.33.5")]
    assert fits == [[True, False], [False, False], [False, True], [False, False]]


def test_nothing_pinned_has_a_known_advisory(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the lock nor the lowest releases have one; without a complete data set, that is said."""
    assert audit.main() == 0
    report = capsys.readouterr().out
    assert "ok   tests/release/lowest.txt" in report
    assert f"checked against {len({one.id for one in audit.advisories()})} advisories" in report
    assert "no complete advisory data set is installed" in report


def test_the_bill_of_materials(tmp_path: Path) -> None:
    """It names the distribution's files and every dependency with its hashes, and is the same each time."""
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    requirements = (root / "tests" / "release" / "newest.txt").read_text()
    archive = tmp_path / "stroma-1.tar.gz"
    archive.write_bytes(b"data")
    bill = bill_of_materials(project, requirements, [archive])
    assert bill == bill_of_materials(project, requirements, [archive])
    assert wrong_bill(bill, project) == []
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert len(bill["components"]) == len(audit.pins(requirements))
    assert {one["scope"] for one in bill["components"] if one["name"] == "pydantic"} == {"required"}
    json.dumps(bill)
    assert wrong_bill({**bill, "components": []}, project)[0] == "the bill of materials lacks pydantic"
    report = statement([archive])
    assert report["subject"][0]["name"] == "stroma-1.tar.gz"
    assert len(report["subject"][0]["digest"]["sha256"]) == 64
