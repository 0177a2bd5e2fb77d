"""LangGraph without a checkpointer."""

from __future__ import annotations

import importlib
import os
from importlib.metadata import version
from typing import Any

from benchmarks.peers.in_memory.work import START, In, Out, Run, add_one

os.environ.update(LANGSMITH_TRACING="false", LANGCHAIN_TRACING_V2="false")


def versions() -> str:
    return f"langgraph {version('langgraph')}"


def compiled(nodes: int) -> Any:
    graphs: Any = importlib.import_module("langgraph.graph")

    def step() -> Any:
        function = add_one()

        async def node(state: In) -> Any:  # LangGraph validates the input; the output's contract is ours.
            output = await function(state)
            Out.model_validate(output)
            return output

        return node

    graph = graphs.StateGraph(In)
    for k in range(nodes):
        graph.add_node(f"n{k}", step())
        graph.add_edge(f"n{k - 1}" if k else graphs.START, f"n{k}")
    graph.add_edge(f"n{nodes - 1}", graphs.END)
    return graph.compile()


def build(nodes: int) -> Run:
    app = compiled(nodes)

    async def run() -> int:
        state = await app.ainvoke(START, {"recursion_limit": nodes + 10})
        return int(state["i"])

    return run
