"""Tiers of tests, Hypothesis profiles, and the guard that keeps the default tier within one process.

A test is in the default tier unless it is marked ``slow`` or ``nightly``. Whatever uses one of
``SLOW_FIXTURES`` is slow by itself. A test of the default tier that starts a process fails and says which
mark it lacks, so a tier is what it claims to be. A test that leaves a handler of signals or logs behind fails
too: the next one in this process would meet it.
"""

import contextlib
import datetime
import gc
import importlib
import json
import logging
import os
import platform
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.fixtures import clock, journal, provider, temporal_server  # noqa: F401
from tests.tiers import (
    CORE_PATHS,
    EACH_SERVER_PATHS,
    FORKING_PATHS,
    LONG_PATHS,
    PROFILES,
    SERVERS,
    SLOW_FIXTURES,
    SLOW_PARAMETERS,
    SLOW_PATHS,
)

_PROCESS_EVENTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system"}
# What SDKs ask of the machine: Sentry's for a release, OpenAI's for the processor.
_SDK_PROCESSES = {("git",), ("uname",)}

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
            # Every run of one tree tries the same cases, but for those of a night.
            derandomize=_name != "nightly",
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        )
    settings.load_profile("dev")


DURATIONS = Path(__file__).with_name("durations.json")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option behind `./dev test --write-durations`, and the one that rewrites golden files."""
    parser.addoption("--update", action="store_true", help="rewrite the golden files of tests")
    parser.addoption(
        "--write-durations", metavar="TIER", help=f"record how long this tier takes in {DURATIONS.name}"
    )


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
                f"{datetime.date.today()}, Python {platform.python_version()}, {os.cpu_count()} cores of "
                f"{platform.machine()}"
            )
            slowest = sorted(self.files.items(), key=lambda file: -sum(s for _, s in file[1].values()))
            recorded["files"] = {
                file: {mark: [tests, round(seconds, 1)] for mark, (tests, seconds) in sorted(marks.items())}
                for file, marks in slowest
            }
        DURATIONS.write_text(json.dumps(recorded, indent=1) + "\n")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Pass over files without a core test if only core tests are to run: a quarter of the files has any."""
    if not config.getoption("markexpr").startswith("core ") or not collection_path.match("test_*.py"):
        return None
    in_core = collection_path.relative_to(config.rootpath).as_posix() in CORE_PATHS
    return None if in_core or "pytest.mark.core" in collection_path.read_text("utf-8") else True


def pytest_sessionstart(session: pytest.Session) -> None:
    """Let each worker import a share first: on a clean clone each would compile all files, 24 s of a core."""
    config = session.config
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if not worker or config.args_source is pytest.Config.ArgsSource.ARGS:
        return
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    tests = DURATIONS.parent
    files = [
        path
        for path in sorted(tests.rglob("test_*.py"))
        if tests / "frameworks" not in path.parents and not pytest_ignore_collect(path, config)
    ]
    for path in files[int(worker) :: workers]:
        name = ".".join(path.relative_to(config.rootpath).with_suffix("").parts)
        # What cannot be imported is reported when it is collected.
        with contextlib.suppress(Exception, pytest.skip.Exception):
            importlib.import_module(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add the marks that follow from a test's place and fixtures; put forking tests first, then long ones."""
    items.sort(
        key=lambda item: (not item.nodeid.startswith(FORKING_PATHS), not item.nodeid.startswith(LONG_PATHS))
    )
    for item in items:
        if item.nodeid.startswith(CORE_PATHS):
            item.add_marker(pytest.mark.core)
        if item.nodeid.startswith(SLOW_PATHS) or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            values = {value for value in item.callspec.params.values() if isinstance(value, str)}
            if values & SLOW_PARAMETERS:
                item.add_marker(pytest.mark.slow)
            is_repeated = values & {"sync-redis", "workers-postgres"} or (
                "postgres" in values and not item.nodeid.startswith(EACH_SERVER_PATHS)
            )
            if is_repeated or (values & SERVERS and item.get_closest_marker("kills")):
                item.add_marker(pytest.mark.nightly)


def pytest_collection_finish() -> None:
    """Take what collection made out of garbage collection: `gc.collect()` then takes 3 ms, not 330."""
    gc.collect()
    gc.freeze()


class _ProcessGuard:
    """Notice processes that start while a test of the default tier runs."""

    def __init__(self) -> None:
        self.is_active = False
        self.event = ""
        self.handlers: list[Any] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.is_active and event in _PROCESS_EVENTS and arguments[:1] not in _SDK_PROCESSES:
            self.event = f"{event} of {arguments[:1]}"


_guard = _ProcessGuard()
sys.addaudithook(_guard)


def _handlers() -> list[Any]:
    """Return the handlers of logs and Stroma's own of signals: what a command in this process adds."""
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    ours = [one for one in signals if str(getattr(one, "__module__", "")).startswith("stroma")]
    listening = [
        one for one in logging.getLogger("stroma").handlers if not isinstance(one, logging.NullHandler)
    ]
    return [*listening, *ours]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Guard the setup and the call of a test that is not slow; keep the handler of Control-C for the next
    one.

    ddtrace puts one of its own in its place when it is imported, and asyncio.run() leaves a foreign handler
    alone. Limits and shared budgets without a store are the process's: the next test may use their names, so
    they are forgotten.
    """
    interrupt = signal.getsignal(signal.SIGINT)
    _guard.event, _guard.handlers = "", _handlers()
    _guard.is_active = not any(item.iter_markers("slow")) and not any(item.iter_markers("nightly"))
    try:
        return (yield)
    finally:
        _guard.is_active = False
        if (gates := sys.modules.get("stroma.limits.gate")) is not None:
            gates._PROCESS.forget()
        if signal.getsignal(signal.SIGINT) is not interrupt:
            signal.signal(signal.SIGINT, interrupt)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown() -> None:
    """Stop guarding: the last test of a file also ends what slow tests of that file have shared."""
    _guard.is_active = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Fail a test of the default tier that started a process, and any test that left a handler behind."""
    report: Any = yield
    if report.when == "teardown" and _handlers() != _guard.handlers:
        report.outcome = "failed"
        report.longrepr = (
            f"{report.nodeid} left a handler of signals or logs behind; undo it, see tests.kit.undone_command"
        )
    if report.when == "teardown" and _guard.event:
        report.outcome = "failed"
        report.longrepr = (
            f"{report.nodeid} started a process ({_guard.event}); mark it with @pytest.mark.slow"
        )
    return report
