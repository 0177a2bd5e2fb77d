"""Pipeline: a named sequence of nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from stroma.checkpoint.queue import RunLimits
from stroma.contracts.contract import ContractRegistry, check_id
from stroma.contracts.node import Group, Node, find_node, output_class
from stroma.contracts.schema import Schema, schema_of
from stroma.engine.config import RunConfig
from stroma.runner.sequence import find_nodes

MAX_VERSION: Final = 100  # characters

__all__ = ["AnyState", "Pipeline", "input_schema_of", "nodes_of", "override_config"]


@dataclass(frozen=True, slots=True, init=False)
class Pipeline:
    """A named sequence of nodes, with an optional configuration.

    Metrics and spans are labelled with the name. Raises TypeError for anything that is not a node, ValueError
    for a name that a store cannot save, and for a limit below 1.

    Attributes:
        name: name of the pipeline in stores, metrics and spans.
        nodes: the nodes, groups and pipelines, in order.
        limits: ``max_runs`` and ``max_runs_per_key``.
        config: settings of its runs, for commands and for runners that have no settings. None: commands use
            those of the only StromaRunner with settings in the pipeline's file.
        versions: the versions of runs that it continues, its own first; () without a version.

    Args:
        version: version of the nodes. A run keeps the version that it started with, and only a pipeline that
            has it, or accepts it, continues the run.
        accepts: earlier versions whose runs it can continue, too.
        max_runs: how many of its runs may have an owner at once, in all workers together; None: no limit.
            Runs that ``run()`` starts count, and are not limited.
        max_runs_per_key: the same for the runs of one key, see :meth:`StromaRunner.submit`.
    """

    name: str
    nodes: tuple[Any, ...]
    config: RunConfig | None
    limits: RunLimits
    versions: tuple[str, ...]

    def __init__(
        self,
        name: str,
        nodes: Iterable[Any],
        *,
        config: RunConfig | None = None,
        version: str | None = None,
        accepts: Sequence[str] = (),
        max_runs: int | None = None,
        max_runs_per_key: int | None = None,
    ) -> None:
        object.__setattr__(self, "name", check_id(name, "pipeline name"))
        object.__setattr__(self, "nodes", tuple(nodes))
        object.__setattr__(self, "config", config)
        for what, number in (("max_runs", max_runs), ("max_runs_per_key", max_runs_per_key)):
            if number is not None and (not isinstance(number, int) or number < 1):
                raise ValueError(f"{what} must be at least 1, or None for no limit, got {number!r}")
        object.__setattr__(self, "limits", RunLimits(max_runs, max_runs_per_key))
        object.__setattr__(self, "versions", _check_versions(version, accepts))
        for node in self.nodes:
            find_node(node)

    def with_config(self, config: RunConfig) -> Pipeline:
        """Return the pipeline with another config."""
        own, accepts = (self.versions[0], self.versions[1:]) if self.versions else (None, ())
        max_runs, per_key = self.limits
        return Pipeline(
            self.name,
            self.nodes,
            config=config,
            version=own,
            accepts=accepts,
            max_runs=max_runs,
            max_runs_per_key=per_key,
        )

    @property
    def version(self) -> str | None:
        """Version of the nodes; None without one."""
        return self.versions[0] if self.versions else None

    @property
    def _takes_any_state(self) -> Literal[True]:
        """For type checkers only: see AnyState."""
        return True


def _check_versions(version: str | None, accepts: Sequence[str]) -> tuple[str, ...]:
    """Return the versions of runs that a pipeline continues. Raises TypeError, ValueError."""
    if isinstance(accepts, str):
        raise TypeError(f"accepts must be a sequence of versions, got {accepts!r}; pass ({accepts!r},)")
    if version is None and accepts:
        raise ValueError(
            "accepts needs version=, which distinguishes new runs from those of earlier versions"
        )
    versions = () if version is None else tuple(dict.fromkeys((version, *accepts)))
    for one in versions:
        if not isinstance(one, str) or not one.isprintable() or " " in one or not 0 < len(one) <= MAX_VERSION:
            raise ValueError(
                f"a version must be a text of 1 to {MAX_VERSION} printable characters without spaces, got {one!r}"
            )
    return versions


class AnyState(Protocol):
    """A pipeline that is no flow: the class of its initial state is not known to type checkers."""

    @property
    def _takes_any_state(self) -> Literal[True]: ...


def nodes_of(pipeline: Pipeline | Iterable[Any]) -> list[Node | Group]:
    """Return the nodes of a pipeline or sequence. Raises TypeError for anything that is not a node."""
    return find_nodes(pipeline.nodes if isinstance(pipeline, Pipeline) else pipeline)


def input_schema_of(nodes: Sequence[Node | Group], registry: ContractRegistry) -> Schema:
    """Return the schema of the input of a run of these nodes. Raises TypeError if they start with a group."""
    first = nodes[0] if nodes else None
    if isinstance(first, Group):
        raise TypeError(
            f"the pipeline starts with {first.node_id!r}; pass the class of its input as input_schema= to resume(), "
            "recover() or fork(); for submit(), serve() or run_many(recover=True), start the pipeline with a node"
        )
    contract = None if first is None else registry.find(first.node_id) or first.contract
    return schema_of(output_class(None) if contract is None else contract.input_schema)


def override_config(config: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """Return the config with the overrides that are not None. Raises ValidationError."""
    changes = {name: value for name, value in overrides.items() if value is not None}
    run_id = changes.pop("run_id", None)
    if not changes:
        return config if run_id is None else config.with_run_id(run_id)
    if run_id is not None:
        changes["run_id"] = run_id
    RunConfig(**changes)  # Validates the overrides.
    return config.model_copy(update=changes)
