"""Run a framework's own tests twice, plain and with every graph or agent attached, and print the difference.

``./dev test --framework NAME --their-tests CHECKOUT``: the checkout is one of the framework's repository, beside this tree and
never in it. Retries are off, so that a guard changes nothing. The exit code is 1 if a test fails with the guard that passes
without it, and is not among the known differences.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

HERE = Path(__file__).parent


@dataclass
class Suite:
    """Where a framework's tests are in its repository, and what they need.

    Attributes:
        folder: where pytest runs, from the root of the repository.
        sources: the packages that are tested, from there.
        options: more arguments of pytest; those that ask for services or downloads are left out.
        known: differences by the pattern of a test's id, with their reason.
    """

    folder: str
    sources: tuple[str, ...]
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    known: dict[str, str] = field(default_factory=dict)


SUITES = {
    "langgraph": Suite(
        "libs/langgraph",
        (
            "libs/langgraph",
            "libs/checkpoint",
            "libs/checkpoint-sqlite",
            "libs/checkpoint-postgres",
            "libs/prebuilt",
            "libs/sdk-py",
        ),
        environment={"NO_DOCKER": "true"},
    ),
    "openai_agents": Suite(
        ".",
        ("src",),
        known={
            "*::test_failed_approved_agent_tool_start_does_not_reexecute": (
                "its hook asks if the tool is the very object; a guarded tool is equal to it, and another object"
            ),
        },
    ),
}


def run(name: str, suite: Suite, checkout: Path, attached: bool, more: list[str]) -> dict[str, str]:
    """Return the outcome of each test."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        sources = [str(checkout / source) for source in suite.sources]
        environment = os.environ | suite.environment | {
            "PYTHONPATH": os.pathsep.join([*sources, str(HERE)]),
            "STROMA_OUTCOMES": file.name,
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        plugins = ["-p", "outcomes", *(["-p", f"attached_{name}"] if attached else [])]
        options = ["-q", "-p", "no:cacheprovider", "--tb=short", "--timeout=120", *suite.options, *more]
        command = [sys.executable, "-m", "pytest", *plugins, *options]
        subprocess.run(command, cwd=checkout / suite.folder, env=environment, check=False)
        text = Path(file.name).read_text("utf-8")
    return json.loads(text) if text else {}


def main(name: str, checkout: str, *more: str) -> int:
    """Return the exit code."""
    suite, place = SUITES[name], Path(checkout).resolve()
    print(f"{name}: its own tests, plain", flush=True)
    plain = run(name, suite, place, False, list(more))
    print(f"{name}: its own tests, attached", flush=True)
    attached = run(name, suite, place, True, list(more))
    if not plain:
        print("no test was run")
        return 1
    failures = {test for test, outcome in attached.items() if outcome == "failed"}
    failures |= {test for test, outcome in plain.items() if outcome == "passed" and test not in attached}
    more_failures = sorted(test for test in failures if plain.get(test) == "passed")
    unexpected = 0
    for test in more_failures:
        why = next((reason for pattern, reason in suite.known.items() if fnmatch(test, pattern)), None)
        unexpected += why is None
        print(f"  {test}: " + ("FAILS ONLY WITH THE GUARD" if why is None else f"known: {why}"))
    passed = sum(outcome == "passed" for outcome in plain.values())
    print(
        f"{name}: {len(plain)} tests, {passed} pass plain; with the guard {len(more_failures)} of these fail, "
        f"{len(more_failures) - unexpected} for known reasons"
    )
    return 1 if unexpected else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
