"""Tiers of tests, Hypothesis profiles, and the guard that keeps the default tier within one process.

A test is in the default tier unless it is marked ``slow`` or ``nightly``. Whatever uses one of ``SLOW_FIXTURES`` is
slow by itself. A test of the default tier that starts a process fails and says which mark it lacks, so a tier is what
it claims to be.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiers import PROFILES, SLOW_FIXTURES, SLOW_PATHS

_PROCESS_EVENTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system"}

try:
    from hypothesis import HealthCheck, settings
except ModuleNotFoundError:  # The environments of agent frameworks lack it.
    pass
else:
    for _name, _examples in PROFILES.items():
        settings.register_profile(
            _name,
            max_examples=_examples,
            deadline=None,
            # Without a database of examples two runs of one tree try the same cases.
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
    settings.load_profile("dev")


DURATIONS = Path(__file__).with_name("durations.json")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option behind `./dev test --write-durations`."""
    parser.addoption("--write-durations", metavar="TIER", help=f"record how long this tier takes in {DURATIONS.name}")


def pytest_configure(config: pytest.Config) -> None:
    """Record durations in the process that collects all reports."""
    tier = config.getoption("--write-durations")
    if tier is not None and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(_Durations(tier))


class _Durations:
    """Write what `./dev test` says before it begins: tests and seconds per tier, and seconds per file."""

    def __init__(self, tier: str) -> None:
        self.tier = tier
        self.began = time.monotonic()
        self.tests = 0
        self.files: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0, 0.0]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        mark = next((name for name in ("nightly", "slow") if name in report.keywords), "default")
        entry = self.files[report.nodeid.partition("::")[0]][mark]
        entry[1] += report.duration
        if report.when == "call":
            entry[0] += 1
            self.tests += 1

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus != 0:
            return
        recorded: dict[str, Any] = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {"tiers": {}}
        recorded["tiers"][self.tier] = [self.tests, round(time.monotonic() - self.began)]
        if self.tier == "all":
            recorded["measured"] = (
                f"{datetime.date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores of {platform.machine()}"
            )
            slowest = sorted(self.files.items(), key=lambda file: -sum(s for _, s in file[1].values()))
            recorded["files"] = {
                file: {mark: [tests, round(seconds, 1)] for mark, (tests, seconds) in sorted(marks.items())}
                for file, marks in slowest
            }
        DURATIONS.write_text(json.dumps(recorded, indent=1) + "\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add the marks that follow from where a test stands and from the fixtures it uses."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & SLOW_FIXTURES or item.nodeid.startswith(SLOW_PATHS):
            item.add_marker(pytest.mark.slow)


class _ProcessGuard:
    """Refuse new processes while a test of the default tier runs."""

    def __init__(self) -> None:
        self.test: str | None = None

    def __call__(self, event: str, _: tuple[Any, ...]) -> None:
        if self.test is not None and event in _PROCESS_EVENTS:
            test, self.test = self.test, None
            pytest.fail(f"{test} starts a process ({event}); mark it with @pytest.mark.slow")


_guard = _ProcessGuard()
sys.addaudithook(_guard)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Guard the setup, the call and the teardown of a test that is not slow."""
    is_guarded = item.get_closest_marker("slow") is None and item.get_closest_marker("nightly") is None
    _guard.test = item.nodeid if is_guarded else None
    try:
        return (yield)
    finally:
        _guard.test = None
