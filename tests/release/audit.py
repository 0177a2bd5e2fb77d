"""Compare pinned releases with published security advisories.

usage: ./dev audit

Checks requirements.lock and the newest and lowest releases in tests/release against the advisories in
tests/release/advisories.json, which names the source of each, and against the package `safety-db` where that
is installed. Opens no connection. Exit code 1 if a pinned release has an advisory.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PINNED = ("requirements.lock", "tests/release/newest.txt", "tests/release/lowest.txt")


class Advisory(NamedTuple):
    """A published advisory: the releases of a package that it is about."""

    package: str
    id: str
    affected: SpecifierSet


def pins(requirements: str) -> list[tuple[str, Version]]:
    """Return the packages that a file of requirements pins, with their versions."""
    result = re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==([\w.!+-]+)", requirements, re.MULTILINE)
    return [(canonicalize_name(name), Version(version)) for name, version in result]


def advisories() -> list[Advisory]:
    """Return the advisories of this project's own list, and those of safety-db where it is installed."""
    listed: Any = json.loads((Path(__file__).with_name("advisories.json")).read_text())["advisories"]
    findings = [
        Advisory(one["package"], one["id"], SpecifierSet(affected))
        for one in listed
        for affected in one["affected"]
    ]
    if importlib.util.find_spec("safety_db") is not None:
        data: Any = importlib.import_module("safety_db")
        for package, specs in data.INSECURE.items():
            for spec in specs:
                try:
                    findings.append(Advisory(canonicalize_name(package), "safety-db", SpecifierSet(spec)))
                except InvalidSpecifier:
                    continue
    return findings


def affected(pinned: Iterable[tuple[str, Version]], known: Iterable[Advisory]) -> list[str]:
    """Return a line for each pinned release that an advisory is about."""
    versions = list(pinned)
    return sorted(
        {
            f"{name} {version}: {advisory.id} (affected: {advisory.affected})"
            for advisory in known
            for name, version in versions
            if name == advisory.package and advisory.affected.contains(version, prereleases=True)
        }
    )


def main() -> int:
    """Print what was found, and how much was looked at."""
    known, wrong = advisories(), 0
    for file in PINNED:
        pinned = pins((ROOT / file).read_text())
        result = affected(pinned, known)
        wrong += len(result)
        print(f"{'FAIL' if result else 'ok':4s} {file}: {len(pinned)} releases")
        for line in result:
            print(f"     {line}")
    print(f"checked against {len({(one.package, one.id) for one in known})} advisories")
    if importlib.util.find_spec("safety_db") is None:
        print(
            "no complete advisory data set is installed, so only those of tests/release/advisories.json are "
            "checked; "
            "where api.osv.dev can be reached, run: pip-audit -r requirements.lock"
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
