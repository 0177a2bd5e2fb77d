"""The pytest plugin. Every session of pytest loads it, so it imports nothing before it is used."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from stroma.testing.clock import FakeClock
    from stroma.testing.faults import FaultPlan

_FAILED = pytest.StashKey[bool]()
#: The test of each snapshot of the session.
_TESTS = pytest.StashKey[dict[Path, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the plugin."""
    group = parser.getgroup("stroma", "pipelines of Stroma")
    group.addoption(
        "--stroma-chaos",
        type=int,
        default=0,
        metavar="N",
        help="Run every test that runs a pipeline N times more, each time with another call made twice, and "
        "say which node is not safe to retry.",
    )
    group.addoption(
        "--stroma-chaos-seed",
        type=int,
        default=None,
        metavar="SEED",
        help="Make the faults of an earlier session again.",
    )
    group.addoption(
        "--stroma-update-snapshots", action="store_true", help="Write the snapshots of stroma_snapshot anew."
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and the faults of ``--stroma-chaos``."""
    config.addinivalue_line(
        "markers", "stroma_no_chaos: the faults of --stroma-chaos stay away from this test of a pipeline."
    )
    if config.option.stroma_chaos > 0:
        seed = getattr(config, "workerinput", {}).get("stroma_chaos_seed", config.option.stroma_chaos_seed)
        config.option.stroma_chaos_seed = random.randrange(1_000_000) if seed is None else seed
        from stroma.testing.chaos import Chaos

        config.pluginmanager.register(Chaos(config), "stroma-chaos")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Pass the seed to the workers of pytest-xdist."""
    node.workerinput["stroma_chaos_seed"] = node.config.option.stroma_chaos_seed


# Not the newer kind of wrapper: old versions of pytest must work where Stroma is installed.
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Any:
    """Record in the test's stash that it failed."""
    outcome = yield
    if outcome.get_result().failed:
        item.stash[_FAILED] = True


# ---------------------------------------------------------------------- fixtures


@pytest.fixture
def stroma_clock() -> Iterator[FakeClock]:
    """Provide a FakeClock: waits of the test take no time."""
    from stroma.testing.clock import FakeClock

    with FakeClock() as clock:
        yield clock


@pytest.fixture
def stroma_faults(request: pytest.FixtureRequest) -> Iterator[FaultPlan]:
    """Provide a FaultPlan for the whole test: ``stroma_faults.fail("draft", attempt=1)``."""
    from stroma.testing.faults import FaultPlan

    with FaultPlan() as plan:
        yield plan
        if request.node.stash.get(_FAILED, False):
            plan.forgive()  # The failure of the test says more.


@pytest.fixture
def stroma_snapshot(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Provide a function that compares a trace or result with a file: ``(trace, name=None, **options)``.

    See trace_snapshot(). The file is in ``snapshots/`` beside the test, and is written with
    ``pytest --stroma-update-snapshots``.
    """
    from stroma.testing.snapshots import compare_with_file, trace_snapshot

    written: dict[Path, str] = {}

    def compare(trace: Any, name: str | None = None, **options: Any) -> None:
        path = _file_for_test(request, "snapshots", name, ".txt")
        text = trace_snapshot(trace, **options)
        test = request.config.stash.setdefault(_TESTS, {}).setdefault(path, request.node.nodeid)
        if test != request.node.nodeid:
            raise AssertionError(
                f"snapshot {path.name} belongs to {test}; pass another name: stroma_snapshot(result, name)"
            )
        if written.setdefault(path, text) != text:
            raise AssertionError(
                f"this test has two snapshots {path.name}; "
                'pass a name for each: stroma_snapshot(result, "name")'
            )
        compare_with_file(text, path, update=request.config.option.stroma_update_snapshots)

    return compare


def _file_for_test(request: pytest.FixtureRequest, directory: str, name: str | None, suffix: str) -> Path:
    test = Path(os.fspath(request.node.path))
    # Two classes can have tests of one name.
    of = "" if request.cls is None else f"{request.cls.__qualname__}."
    own = re.sub(r"[^\w.-]+", "-", of + request.node.name).strip("-")
    return test.parent / directory / test.stem / f"{own if name is None else f'{own}.{name}'}{suffix}"
