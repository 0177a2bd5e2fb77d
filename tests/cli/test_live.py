"""The live table of a run on a terminal."""

import asyncio
import io
import os
import re
import signal
import sys

import pytest
from pydantic import BaseModel
from rich.console import Console
from tests.cli.terminal import Emulator, TerminalFile, run_on_terminal
from tests.kit import Item, computing

from stroma import (
    ExecutionBudget,
    FailureClass,
    FailurePolicy,
    MapProgress,
    StromaRunner,
    current_node,
    map_over,
    stroma_node,
)
from stroma.cli.live import LiveProgress, Row, Screen, fold_rows, rows_table
from stroma.cli.output import cell_width
from stroma.cli.progress import FAILED, OK


@pytest.fixture
def terminal(monkeypatch):
    """Make stderr a terminal of 80 columns and 24 rows; pytest replaced it before."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def begin():
        file = TerminalFile(Emulator())
        monkeypatch.setattr(sys, "stderr", file)
        monkeypatch.setattr(sys, "__stderr__", file)
        return file

    return begin


class Items(BaseModel):
    items: list[Item]


def _node(node_id, func, input=Item, output=Item):
    return stroma_node(node_id, input=input, output=output)(func)


def _run(progress, nodes, state, **config):
    runner = StromaRunner.quick(hooks=[progress.hooks()], **config)
    try:
        return asyncio.run(runner.run(nodes, state))
    finally:
        progress.close()


def test_a_run_is_a_table_that_folds_into_a_summary(terminal):
    """A run is a table with a line for each node or map; its end is a summary of outcome and retries."""
    terminal = terminal()
    tries = {}
    seen = []

    async def price(state):
        tries[state.n] = tries.get(state.n, 0) + 1
        if state.n == 3 and tries[3] == 1:
            raise ConnectionError("the line is dead")
        await asyncio.sleep(0)
        progress._screen.refresh()
        seen.append(terminal.emulator.text)
        return {"n": state.n}, 1000, 100, "gpt-4o-mini"

    last = computing(lambda state: {"n": len(state.items)})
    nodes = [map_over("items", _node("price", price), into="items"), _node("last", last, Items)]
    budget = ExecutionBudget(max_cost_usd=0.01)
    progress = LiveProgress("prices", ["map_over(items, price)", "last"], budget)
    policy = {FailureClass.RECOVERABLE: FailurePolicy(max_retries=1, backoff_seconds=0)}
    state = Items(items=[Item(n=n) for n in range(5)])
    result = _run(progress, nodes, state, policy_map=policy, budget=budget)
    assert result.status == "COMPLETED"
    assert any("/5" in text and "░" in text and "last" in text and "pending" in text for text in seen), seen
    lines = terminal.emulator.text.splitlines()
    assert "prices: run " in lines[0]
    assert "spent $0.001050, 5,500 tok; 10% of $0.010000" in lines[1]
    assert lines[2].split() == ["TRY", "TIME", "TOKENS", "COST"]
    assert "5 items: 5 ok, 1 retried" in lines[3]
    assert lines[3].split()[-2:] == ["5,500", "$0.001050"]
    assert lines[4].split()[:3] == ["last", "ok", "1"]
    assert lines[5] == "retried: map_over(items, price): 1 retry (connection 1)"
    assert not "".join(lines[6:])
    assert all(len(line) < 80 for text in [*seen, terminal.emulator.text] for line in text.splitlines())


def test_what_is_printed_meanwhile_stands_above_the_table(terminal):
    """Output of nodes and loggers stands above the table in whole lines: nothing is lost or overwritten."""
    terminal = terminal()
    table = ["one", "two"]
    screen = Screen(lambda: "\n".join(table))
    holder = sys.stderr
    screen.open()
    print("first line", file=sys.stderr)
    holder.write("a part, ")
    screen.refresh()
    assert terminal.emulator.text.splitlines() == ["first line", "one", "two"]
    holder.write("10%\r\x1b[31mand its end\x1b[0m\n")
    table.append("three")
    screen.say("\na message of a signal\n")
    screen.refresh()
    printed = ["first line", "and its end", "a message of a signal"]
    assert terminal.emulator.text.splitlines() == [*printed, "one", "two", "three"]
    holder.write("no line end")
    screen.close()
    assert terminal.emulator.text.rstrip().splitlines() == [*printed, "no line end"]
    assert "write" not in vars(holder)
    assert screen.say("too late") is False


@pytest.mark.parametrize("columns", [20, 39, 60, 79, 200])
def test_names_and_failures_of_any_length_fit(columns):
    """No line is wider than the terminal, whatever its names and amounts; hidden rows are counted."""
    rows = [Row(f"名前 node {n} " * 50, depth=n % 9) for n in range(30)]
    for n, row in enumerate(rows):
        row.verb, row.what = (FAILED, "w" * 900) if n % 3 else (OK, "")
        row.tokens, row.cost_usd, row.first, row.last = 10**9, 12345.678901, 0.0, 10.0**6
    rows[1].progress = MapProgress(5 * 10**9, 10**10, 10**7, 0, 123456.7, 10.0**6, 1.0, False)
    rows[1].active = {(1, ""): None}
    shown, hidden = fold_rows(rows, 10)
    console = Console(file=io.StringIO(), width=columns)
    console.print(rows_table(shown, hidden, columns, 5.0))
    lines = console.file.getvalue().splitlines()
    assert rows[1] in shown
    assert len(shown) == 9
    assert len(lines) == 11
    assert all(cell_width(line) <= columns for line in lines)
    assert lines[-1].startswith("and 21 more")


def test_waits_and_cooldowns_say_what_they_wait_for(terminal):
    """A node that waits for its turn, and a limit in cooldown, are shown with reason and remaining time."""
    terminal = terminal()
    seen = []

    async def call(state):
        node = current_node()
        await progress._node_wait(node.ctx.run_id, node.node_id, "limit 'api'", 9.0)
        await progress._limit_cooldown(node.ctx.run_id, "api", 30.0)
        progress._screen.refresh()
        seen.append(terminal.emulator.text)
        return {"n": state.n}

    progress = LiveProgress("calls", ["call"], ExecutionBudget())
    _run(progress, [_node("call", call)], Item(n=1))
    assert re.search(r"limit api in cooldown for (30.0|29.\d) s: its provider asked to wait", seen[0])
    assert re.search(r"call +(9.0|8.\d) s: waits for limit 'api'", seen[0])


@pytest.mark.slow
def test_control_c_leaves_a_clean_screen(stroma):
    """Ctrl-C in the table: the message, the summary and the next command follow in order, the table once."""
    stroma.file("waits.py", "from sums import *\nimport sums\n")
    asked = []

    def at(process, emulator):
        if (
            "running" in emulator.text
            and "second" in emulator.text
            and not asked
            and len(stroma.calls()) == 2
        ):
            asked.append(True)
            os.kill(process.pid, signal.SIGINT)

    code, emulator, written = run_on_terminal(
        ["stroma", "run", "sums.py:pipeline", '{"start": 1}', "--run-id", "stopped"],
        stroma.home,
        stroma.env | {"SECOND_AWAITS": "asyncio.sleep(20)"},
        at=at,
    )
    assert code == 130, written
    lines = emulator.text.splitlines()
    assert "printed by a node" in lines
    assert sum(line.startswith("stroma: SIGINT: stopping;") for line in lines) == 1
    assert sum("TRY" in line for line in lines) == 1
    assert any("second" in line and "cancelled" in line for line in lines)
    assert any("resume with: " in line for line in lines)
    assert "\x1b[?25l" not in written


@pytest.mark.slow
def test_a_small_terminal_gets_lines(stroma):
    """A terminal without room for a table gets plain lines."""
    command = ["stroma", "run", "sums.py:pipeline", '{"start": 1}']
    code, emulator, written = run_on_terminal(command, stroma.home, stroma.env, columns=39, rows=24)
    assert code == 0
    assert "TRY" not in written
    assert "second" in emulator.text


def test_steps_of_a_flow_and_of_flows_inside_are_rows(terminal):
    """A flow has a row with the sums of its steps, each step and map its own; no hook of the table fails."""
    terminal = terminal()
    runner = StromaRunner.quick()

    @runner.node("ask", input=Item, output=Item)
    async def ask(item):
        current_node().report_usage(input_tokens=30, output_tokens=10)
        return Item(n=item.n + 1)

    @runner.flow("inner", input=Item, output=Item)
    async def inner(flow, item):
        return await flow.step(ask, item)

    @runner.flow("outer", input=Item, output=Item)
    async def outer(flow, item):
        await flow.map(ask, [item] * 3)
        return await flow.run(inner, await flow.step(ask, item))

    progress = LiveProgress("outer", ["outer"], ExecutionBudget())
    result = _run(progress, outer, Item(n=0))
    assert result.final_state == Item(n=2)
    assert result.hook_errors == []
    text = terminal.emulator.text
    assert re.search(r"^outer +flow +200$", text, re.MULTILINE), text
    assert len(re.findall(r"^ +ask +3 calls: ok .* 120$", text, re.MULTILINE)) == 1, text
    assert len(re.findall(r"^ +ask +ok .* 40$", text, re.MULTILINE)) == 2, text
