"""CrewAI killed between the methods of a flow: its own persistence and our journal, both in files."""

from pathlib import Path
from typing import Any

import pytest
from crewai.flow.flow import Flow, listen, start
from crewai.flow.persistence import persist
from crewai.flow.persistence.sqlite import SQLiteFlowPersistence
from pydantic import BaseModel
from tests.frameworks.kit import PAID, Ledger, answer, check_killed, die, guard_of, holds

from stroma.adapters.crewai import attach

METHODS = ("first", "second", "third")


class Words(BaseModel):
    id: str = "flow"
    words: list[str] = []


def live(folder: str, dies_before: str) -> None:
    """One process: call the flow with its id, which CrewAI continues with the state that it has persisted."""
    ledger = Ledger(folder)

    def work(flow: Any, name: str) -> None:
        if name in flow.state.words:
            return  # CrewAI calls every method again, with the state of its checkpoint.
        if name == dies_before:
            die()
        ledger.pay(name)
        flow.state.words.append(name)

    @persist(SQLiteFlowPersistence(str(Path(folder, "flows.db"))))
    class Working(Flow[Words]):
        @start()
        def first(self) -> None:
            work(self, "first")

        @listen(first)
        def second(self) -> None:
            work(self, "second")

        @listen(second)
        def third(self) -> None:
            work(self, "third")

    guard = guard_of(store=str(Path(folder, "r.db")), run_id="r", resume=True, lease_seconds=0.2)
    flow = attach(Working(suppress_flow_events=True), guard)
    flow.kickoff(inputs={"id": "flow"})
    answer(folder, flow.state.words)


@pytest.mark.nightly
@pytest.mark.timeout(600)
@holds("killed")
@pytest.mark.parametrize("dies_before", METHODS)
def test_killed_between_methods_it_pays_for_nothing_twice(dies_before: str, tmp_path: Path) -> None:
    """After SIGKILL at a boundary, a kickoff with the flow's id is right, in one run, and pays once."""
    check_killed(live, tmp_path, dies_before, (list(METHODS), METHODS, 3 * PAID))
