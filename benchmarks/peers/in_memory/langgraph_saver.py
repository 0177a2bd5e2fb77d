"""LangGraph with its in-memory checkpointer."""

from __future__ import annotations

import importlib
from typing import Any

from benchmarks.peers.in_memory.langgraph_ import compiled, versions
from benchmarks.peers.in_memory.work import START, Run

__all__ = ["build", "versions"]


def build(nodes: int) -> Run:
    app = compiled(nodes)
    memory: Any = importlib.import_module("langgraph.checkpoint.memory")

    async def run() -> int:
        app.checkpointer = memory.InMemorySaver()  # Fresh for each run, as Stroma's store is.
        config = {"recursion_limit": nodes + 10, "configurable": {"thread_id": "run"}}
        state = await app.ainvoke(START, config)
        return int(state["i"])

    return run
