"""Run a framework's own tests twice, plain and with every graph or agent attached, and print the difference.

``./dev test --framework NAME --their-tests CHECKOUT``: the checkout is one of the framework's repository,
beside this tree and never in it. Retries are off, so that a guard changes nothing. A test that fails only
with the guard is run again alone, both ways. The exit code is 1 if it fails again only with the guard and is
not among the known differences, or if a session has no outcomes.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
#: The longest of these sessions has taken 25 minutes, on two cores that others used too.
MAX_SESSION_SECONDS = 3 * 3600


@dataclass
class Suite:
    """Where a framework's tests are in its repository, and what they need.

    Attributes:
        plugin: the module of the plugin that guards everything.
        folder: where pytest runs, from the root of the repository.
        sources: the packages that are tested, from there.
        options: more arguments of pytest; those that ask for services or downloads are left out.
        known: differences by the pattern of a test's id, with their reason.
    """

    plugin: str
    folder: str
    sources: tuple[str, ...]
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    known: dict[str, str] = field(default_factory=dict)


SUITES = {
    "langgraph": Suite(
        "attached_langgraph",
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
        known={
            "*::test_error_handler_resumes_after_crash_multiple_nodes": (
                "one node has to fail before the graph sees that the handler of another has crashed: it "
                "failed plain, too, "
                "37 times of 60"
            )
        },
    ),
    "openai_agents": Suite(
        "attached_openai_agents",
        ".",
        ("src",),
        known={
            "*::test_failed_approved_agent_tool_start_does_not_reexecute": (
                "its hook asks if the tool is the very object; a guarded tool is equal to it, and another "
                "object"
            )
        },
    ),
}


def run(suite: Suite, checkout: Path, attached: bool, more: list[str]) -> dict[str, str]:
    """Return the outcome of each test; without any, print the exit code of the session."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        sources = [str(checkout / source) for source in suite.sources]
        environment = (
            os.environ
            | suite.environment
            | {
                "PYTHONPATH": os.pathsep.join([*sources, str(HERE)]),
                "STROMA_OUTCOMES": file.name,
                "PYTHONDONTWRITEBYTECODE": "1",
            }
        )
        plugins = ["-p", "outcomes", *(["-p", suite.plugin] if attached else [])]
        # A module that needs a service or another package fails alone, and not the session.
        options = [
            "-q",
            "-p",
            "no:cacheprovider",
            "--tb=short",
            "--timeout=120",
            "--continue-on-collection-errors",
        ]
        command = [sys.executable, "-m", "pytest", *plugins, *options, *suite.options, *more]
        folder = checkout / suite.folder
        try:
            code: Any = subprocess.run(
                command, cwd=folder, env=environment, check=False, timeout=MAX_SESSION_SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"none within {MAX_SESSION_SECONDS} s"
        text = Path(file.name).read_text("utf-8")
    if not text:
        print(f"the session has no outcomes, exit code {code}; see its output above", flush=True)
    return json.loads(text) if text else {}


def main(name: str, checkout: str, *more: str) -> int:
    """Return the exit code."""
    suite, place = SUITES[name], Path(checkout).resolve()
    plain, attached = run_both(name, suite, place, list(more))
    if not plain or not attached:
        return 1
    differences = broken(plain, attached)
    known = {
        test: reason
        for test in differences
        for pattern, reason in suite.known.items()
        if fnmatch(test, pattern)
    }
    unexplained = [test for test in differences if test not in known]
    again = unexplained
    if unexplained:
        plain_again, attached_again = run_both(f"{name}, once more", suite, place, unexplained)
        again = broken(plain_again, attached_again) if plain_again else unexplained
    for test in differences:
        alone = "FAILS ONLY WITH THE GUARD" if test in again else "failed with the guard, not alone"
        print(f"  {test}: " + (f"known: {known[test]}" if test in known else alone))
    print(
        f"{name}: {len(plain)} tests, {count(plain)} pass plain and {count(attached)} with the guard; "
        f"{len(differences)} of "
        f"those that pass plain fail with the guard, {len(known)} for known reasons and {len(again)} again "
        f"when they run alone"
    )
    return 1 if again else 0


def run_both(title: str, suite: Suite, place: Path, more: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the outcomes of the tests plain, and with everything guarded."""
    print(f"{title}: its own tests, plain", flush=True)
    plain = run(suite, place, False, more)
    print(f"{title}: its own tests, guarded", flush=True)
    return plain, run(suite, place, True, more)


def broken(plain: dict[str, str], attached: dict[str, str]) -> list[str]:
    """Return the tests that pass plain, and with the guard fail or are not run."""
    passed = (test for test, outcome in plain.items() if outcome == "passed")
    return sorted(test for test in passed if attached.get(test, "failed") == "failed")


def count(outcomes: dict[str, str]) -> int:
    """Return the number of tests that passed."""
    return sum(outcome == "passed" for outcome in outcomes.values())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
