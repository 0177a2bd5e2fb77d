"""``pytest --stroma-chaos=N``: repeat tests of pipelines with faults. Loaded by the plugin on demand."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
from _pytest.runner import runtestprotocol
from pydantic import BaseModel

from stroma.contracts.node import Group, Node
from stroma.contracts.schema import schema_of
from stroma.engine.context import INTERCEPTORS, Call, Interceptor
from stroma.engine.execution import RunningNode


class _Place(NamedTuple):
    """The n-th call of a node in a test, counted from 0 per node id."""

    node_id: str
    number: int


class _Watch(Interceptor):
    """Interceptor that records the calls of a test, and makes one of them twice.

    The first output is lost, as after a crash between the end of a node and its commit.
    """

    def __init__(self, at: _Place | None = None) -> None:
        self.places: list[_Place] = []
        self._counts: dict[str, int] = {}
        self._at = at

    async def call(self, run: RunningNode, node: Node | Group, call: Call, state: BaseModel) -> Any:
        if type(node) is not Node:
            return await call(state)
        number = self._counts[run.node_id] = self._counts.get(run.node_id, -1) + 1
        place = _Place(run.node_id, number)
        self.places.append(place)
        if place != self._at:
            return await call(state)
        pristine = schema_of(type(state)).copy(state)
        reported = list(run.reported or ())
        await call(state)
        # The usage of the lost call was never recorded either.
        run.reported = reported or None
        return await call(pristine)


@contextmanager
def _watched(watch: _Watch) -> Iterator[None]:
    INTERCEPTORS.append(watch)
    try:
        yield
    finally:
        INTERCEPTORS.remove(watch)


class Chaos:
    """Repeats a passed test that ran a pipeline, with new fixtures each time."""

    def __init__(self, config: pytest.Config) -> None:
        self.rounds: int = config.option.stroma_chaos
        self.seed: int = config.option.stroma_chaos_seed
        self._watch: _Watch | None = None

    def pytest_report_header(self) -> str:
        seed = f"--stroma-chaos-seed={self.seed}"
        return f"stroma: {self.rounds} more runs of each test of a pipeline, with faults; {seed}"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        if self._watch is None:
            return (yield)
        with _watched(self._watch):
            return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if item.get_closest_marker("stroma_no_chaos") is not None or not hasattr(item, "_initrequest"):
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        places, passed, reports = self._run(item, nextitem, _Watch())
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        if passed and places:
            self._rounds(item, nextitem, places)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _run(
        self, item: pytest.Item, nextitem: pytest.Item | None, watch: _Watch
    ) -> tuple[list[_Place], bool, list[pytest.TestReport]]:
        self._watch = watch
        try:
            reports = runtestprotocol(item, log=False, nextitem=nextitem)
        finally:
            self._watch = None
        ran = [report for report in reports if report.when == "call"]
        passed = bool(ran) and all(report.passed for report in reports) and not hasattr(ran[0], "wasxfail")
        return watch.places, passed, reports

    def _rounds(self, item: pytest.Item, nextitem: pytest.Item | None, places: list[_Place]) -> None:
        # From the name of the test, so that a test alone gets the same faults as among others.
        dice = random.Random(f"{self.seed} {item.nodeid}")
        reported: set[str] = set()
        for number in range(self.rounds):
            at = dice.choice(places)
            if at.node_id in reported:
                continue  # One failure per node is enough.
            item._initrequest()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
            _, passed, reports = self._run(item, nextitem, _Watch(at))
            failed = [report for report in reports if report.failed]
            if passed or not failed:
                continue
            reported.add(at.node_id)
            report = failed[0]
            what = f"run {number + 1}: call {at.number + 1} of node {at.node_id!r} was made twice"
            report.sections.insert(0, ("stroma chaos", f"{what} (--stroma-chaos-seed={self.seed})"))
            report.__dict__["stroma_chaos"] = {"node_id": at.node_id, "call": at.number + 1}
            item.ihook.pytest_runtest_logreport(report=report)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        sensitive_tests = [
            (report.stroma_chaos, report.nodeid)
            for category in ("failed", "error")
            for report in terminalreporter.stats.get(category, ())
            if hasattr(report, "stroma_chaos")
        ]
        terminalreporter.section(f"stroma chaos, --stroma-chaos-seed={self.seed}")
        if not sensitive_tests:
            terminalreporter.write_line("no test of a pipeline failed because a node was called twice")
        for fault, nodeid in sensitive_tests:
            node, call = fault["node_id"], fault["call"]
            line = f"node {node!r} is not safe to retry: {nodeid} fails if its call {call} is made twice"
            terminalreporter.write_line(line)
