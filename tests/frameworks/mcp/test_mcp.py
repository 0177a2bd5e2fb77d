"""MCP: a real client and a real server in one process, with and without the guard, and no network."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from mcp import ClientSession
from pydantic import BaseModel
from tests.frameworks.contract import City, Narrow, Strict, Weather
from tests.frameworks.kit import PAID, Seen, guard_of, lines_of, pay, result_of, spent

from stroma import BudgetExceeded, ContractViolation, ExecutionBudget, NodeContract, RunStatus
from stroma.adapters import Guard, UnknownNode
from stroma.adapters.mcp import attach
from stroma.engine.effects import UnknownOutcome

try:
    from mcp.server.mcpserver import MCPServer
except ImportError:  # Before 2.0.
    from mcp.server.fastmcp import FastMCP as MCPServer


class Nothing(BaseModel):
    pass


class Session(ClientSession):
    """A session whose connection is lost as often as it is told."""

    lost = 0
    calls = 0

    async def call_tool(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.lost:
            self.lost -= 1
            raise ConnectionError("lost")
        return await super().call_tool(*args, **kwargs)


server: Any = MCPServer("weather")


@server.tool()
def weather(city: str) -> dict[str, int]:
    """Return the weather of a city."""
    return {"celsius": len(city)}


@server.tool()
def broken() -> str:
    """Never works."""
    raise ValueError("no such thing")


@contextlib.asynccontextmanager
async def session_of(guard: Guard | None = None, contracts: Any = None) -> AsyncIterator[Any]:
    """Connect a session to the server, over streams in memory."""
    from mcp.shared.memory import create_client_server_memory_streams

    low: Any = getattr(server, "_lowlevel_server", None) or server._mcp_server
    async with create_client_server_memory_streams() as (client, there):
        options = low.create_initialization_options()
        task = asyncio.create_task(low.run(there[0], there[1], options))
        try:
            async with Session(*client) as session:
                await session.initialize()
                yield session if guard is None else attach(session, guard, contracts)
        finally:
            task.cancel()
            await asyncio.wait([task])


def text_of(result: Any) -> str:
    return "".join(part.text for part in result.content)


async def test_a_call_of_a_tool_is_a_step_and_its_result_the_same() -> None:
    """What a server answers is what the caller gets; a lost connection is tried again."""
    guard = guard_of()
    async with session_of() as plain:
        expected = await plain.call_tool("weather", {"city": "Oslo"})
    async with session_of(guard, {"weather": (City, Weather)}) as session, guard.run():
        await session.list_tools()
        session.lost = 1
        got = await session.call_tool("weather", {"city": "Oslo"})
    assert got.model_dump() == expected.model_dump()
    assert lines_of(guard) == ["weather failure", "weather success"]


@pytest.mark.parametrize(
    ("contract", "direction"), [((Narrow, Weather), "input"), ((City, Strict), "output")]
)
async def test_a_violation_is_caught_at_its_tool(contract: Any, direction: str) -> None:
    """Bad arguments reach no server, and a bad result no caller."""
    guard = guard_of()
    async with session_of(guard, {"weather": contract}) as session:
        with pytest.raises(ContractViolation) as caught:
            async with guard.run():
                await session.call_tool("weather", {"city": "Oslo"})
    assert (caught.value.node_id, caught.value.direction) == ("weather", direction)
    assert session.calls == (direction == "output")
    assert result_of(guard).status is RunStatus.FAILED


@pytest.mark.parametrize("contracts", [None, {"broken": (Nothing, Weather)}])
async def test_an_error_result_is_returned_unchanged(contracts: Any) -> None:
    """A tool that fails in the server has answered: its caller decides, also under an output contract."""
    guard = guard_of()
    async with session_of(guard, contracts) as session, guard.run():
        assert "Error executing tool" in text_of(await session.call_tool("broken"))
    assert (session.calls, lines_of(guard)) == (1, ["broken failure"])
    assert result_of(guard).status is RunStatus.COMPLETED


async def test_an_error_result_of_an_effect_leaves_its_outcome_unknown() -> None:
    """The effect may have happened before it failed: it is not called again before somebody states so."""
    guard = guard_of()
    contract = NodeContract(node_id="broken", input_schema=Nothing, output_schema=Weather, effect=True)
    async with session_of(guard, {"broken": contract}) as session:
        with pytest.raises(UnknownOutcome):
            async with guard.run():
                assert "Error executing tool" in text_of(await session.call_tool("broken"))
                await session.call_tool("broken")
    assert (session.calls, result_of(guard).status) == (1, RunStatus.SUSPENDED)


async def test_a_contract_of_an_unknown_tool_is_an_error() -> None:
    """When the server has said which tools there are."""
    async with session_of(guard_of(), {"wether": (City, Weather)}) as session:
        with pytest.raises(UnknownNode, match=r"unknown tool 'wether'; .* 'weather'"):
            await session.list_tools()


async def test_a_second_attach_with_other_contracts_is_an_error() -> None:
    """And with another guard."""
    guard = guard_of()
    async with session_of(guard, {"weather": (City, Weather)}) as session:
        assert attach(session, guard) is session
        with pytest.raises(ValueError, match="with other contracts"):
            attach(session, guard, {"weather": (City, Strict)})
        with pytest.raises(ValueError, match="another guard"):
            attach(session, guard_of())


async def test_a_spent_budget_refuses_calls() -> None:
    """What other steps have used counts: the next call reaches no server."""
    guard = guard_of(budget=ExecutionBudget(max_tokens_total=PAID - 1))
    model = guard.wrap("model", pay)
    async with session_of(guard) as session:
        with pytest.raises(BudgetExceeded):
            async with guard.run():
                with contextlib.suppress(BudgetExceeded):
                    model()
                await session.call_tool("weather", {"city": "Oslo"})
    assert session.calls == 0


async def test_fifty_runs_at_once_over_one_session() -> None:
    """Each call belongs to the run that made it, in parallel."""
    seen = Seen()
    guard = guard_of(seen)
    async with session_of(guard) as session:

        async def one(number: int) -> None:
            async with guard.run(number):
                await asyncio.gather(*(session.call_tool("weather", {"city": city}) for city in ("a", "bb")))

        await asyncio.gather(*(one(number) for number in range(50)))
    assert spent(seen, guard) == (50, 0)
    assert {len(result.trace) for result in seen.results} == {2}
