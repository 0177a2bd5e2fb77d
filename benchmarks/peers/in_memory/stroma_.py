"""Stroma with its in-memory store: this tree, or the release that is published. Their API is the same."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from benchmarks.peers.in_memory.work import START, In, Out, Run, add_one
from stroma import (
    AsyncInMemoryStore,
    CheckpointManager,
    ContractRegistry,
    NodeContract,
    RunConfig,
    StromaRunner,
    stroma_node,
)


def versions() -> str:
    """Return the distribution that provides ``stroma`` here: ours, or the published library."""
    try:
        return f"stroma-runner {metadata.version('stroma-runner')}"
    except metadata.PackageNotFoundError:
        return f"stroma {metadata.version('stroma')}"


def build(nodes: int) -> Run:
    registry = ContractRegistry()
    sequence: list[Any] = []
    for k in range(nodes):
        contract: Any = NodeContract(node_id=f"n{k}", input_schema=In, output_schema=Out)
        registry.register(contract)
        sequence.append(stroma_node(f"n{k}", contract)(add_one()))

    async def run() -> (
        int
    ):  # As a service would do for each request: a store, a configuration and a runner of its own.
        runner = StromaRunner(registry, CheckpointManager(AsyncInMemoryStore()), RunConfig())
        result = await runner.run(sequence, In(**START))
        assert isinstance(result.final_state, Out), result
        return result.final_state.i

    return run
