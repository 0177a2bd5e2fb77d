"""Runs that a framework's call has begun: in the journal, the commands and on the pages, like others."""

import asyncio
import html
from pathlib import Path
from typing import Any

import pytest
from tests.ui.conftest import Site
from tests.ui.test_pages import rows
from tests.ui.test_security import attempts_of

from stroma import FailurePolicy, SQLiteStore, StromaRunner
from stroma.adapters import Guard
from stroma.cli import main as stroma_command


class Framework:
    """An agent as they all are: it calls its model and its tools by itself."""

    def __init__(self, guard: Guard) -> None:
        self.guard, self.failures = guard, [TimeoutError("the provider took too long")]
        self.model = guard.wrap("model", self._model, usage=lambda answer: answer["usage"])
        self.tool = guard.wrap("weather", self._tool)
        self.run = guard.each_call(guard.wrap("forecaster", self._run), lambda args, _: {"asked": args[0]})

    async def _model(self, text: str) -> dict[str, Any]:
        if self.failures:
            raise self.failures.pop()
        return {"text": text, "usage": {"input_tokens": 9, "output_tokens": 1, "model": "gpt-4o"}}

    async def _tool(self, city: str) -> int:
        if city == "Nowhere":
            raise LookupError("no such city")
        return len(city)

    async def _run(self, city: str) -> int:
        await self.model("which tool?")
        return await self.tool(city)


def test_a_guarded_run_is_shown(store: SQLiteStore, serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It is shown with its tree, attempts, tokens, cost and cause, and how its program resumes it."""
    quick = {kind: FailurePolicy(max_retries=1, backoff_seconds=0) for kind in ("RECOVERABLE", "AMBIGUOUS")}
    guard = Guard(StromaRunner.quick(store=store, policy_map=quick, pipeline="agents"))
    assert asyncio.run(Framework(guard).run("Oslo")) == 4
    with pytest.raises(LookupError):
        asyncio.run(Framework(guard).run("Nowhere"))
    site: Site = serve(store)
    bad, good = rows(site.get("/").text)
    assert (good[0], good[2]) == ("COMPLETED", "agents")
    assert bad[0] == "PARTIAL"
    assert bad[3].startswith("weather: AMBIGUOUS")
    failed, done = (run.run_id for run in store.list_runs())
    page = site.get("/run", id=done).text
    # Behind "@" stands a checksum of the step's input.
    assert [[row[0].partition("@")[0], *row[1:4]] for row in rows(page)] == [
        ["0", "forecaster", "1", "success"],
        ["0.model#0", "model", "1", "failure"],
        ["0.model#0", "model", "2", "success"],
        ["0.weather#0", "weather", "1", "success"],
    ]
    assert [row[6] for row in rows(page)] == ["", "", "10", ""]
    assert page.count('<details open><summary class="row">') == 1
    text = html.unescape(site.get("/run", id=failed).text)
    assert ">weather</a></b>" in text
    assert f"<b>Resume with</b> <code>run_id='{failed}', resume=True</code>" in text
    assert {site.ask("GET", address).status for address in attempts_of(site, failed)} == {200}

    assert stroma_command(["show", done, "--tree", "--db", str(Path(store.path))]) == 0
    shown = capsys.readouterr().out
    steps = [line.split()[1:3] for line in shown.splitlines() if line.startswith("0.")]
    assert steps == [["├─", "model"], ["├─", "model"], ["└─", "weather"]]
    assert "the provider took too long" in shown
    assert stroma_command(["show", failed, "--db", str(Path(store.path))]) == 0
    assert f"continue it with its program, under run_id='{failed}' and resume=True" in capsys.readouterr().err
