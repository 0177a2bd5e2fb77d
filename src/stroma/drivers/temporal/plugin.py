"""Plugin for clients and workers of Temporal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest
from temporalio.client import Client
from temporalio.plugin import SimplePlugin
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import Worker, WorkflowRunner
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner

from stroma.checkpoint import JournalStore
from stroma.checkpoint.payloads import BlobStore, blob_store
from stroma.contracts.contract import ContractRegistry
from stroma.drivers.remote.attempts import Attempts
from stroma.drivers.temporal import names
from stroma.drivers.temporal.activity import Activities
from stroma.drivers.temporal.workflow import FlowPipelines, StromaFlow, StromaRun
from stroma.engine.config import RunConfig
from stroma.runner.pipeline import Pipeline

__all__ = ["StromaPlugin", "register_search_attributes", "stroma_worker"]

#: Modules that a workflow takes from the process: its own code builds no models of the user's.
_PASSED_THROUGH = ("stroma", "pydantic", "pydantic_core", "annotated_types")
_HELD_BACK = timedelta(seconds=1)


class StromaPlugin(SimplePlugin):
    """Lets workers perform runs of Stroma beside their other work; a client stays unchanged.

    The user's data converter and codec stay as they are: all that Stroma sends is JSON data.

    ``pipelines``: what a worker can run. ``config``: its hooks, classifiers, limits, shared budgets, redact and the objects
    of its context; policies, timeouts and budgets come with each run. Without one, each pipeline's own is taken.
    ``payloads``: where states of 256 KiB and more go: a BlobStore, a directory that all machines share, or a URL.
    ``store``: a journal store that every run is written to when it ends or waits, for ``stroma runs``, ``show`` and ``ui``.
    ``beat_seconds``: how often an attempt says that it is alive, and hears whether it is cancelled; None is half of the
    run's ``heartbeat_seconds``. Raises TypeError for what is no pipeline or has no journal.
    """

    def __init__(
        self,
        pipelines: Iterable[Pipeline] = (),
        *,
        config: RunConfig | None = None,
        registry: ContractRegistry | None = None,
        payloads: BlobStore | str | None = None,
        store: Any = None,
        beat_seconds: float | None = None,
    ) -> None:
        listed = list(pipelines)
        for pipeline in listed:
            if not isinstance(pipeline, Pipeline):
                raise TypeError(
                    f"pipelines must be Pipeline objects, got {pipeline!r}; pass Pipeline(name, nodes)"
                )
        if store is not None and not isinstance(store, JournalStore):
            raise TypeError(f"{store!r} has no journal of runs; use a journal store such as SQLiteStore")
        self.attempts = Attempts(
            listed, config=config, registry=registry, payloads=blob_store(payloads), store=store
        )
        self.worker_activities = activities = Activities(self.attempts, beat_seconds)
        super().__init__(
            "stroma",
            activities=[activities.node, activities.run] if listed else None,
            workflows=_with_runs,
            interceptors=[FlowPipelines(self.attempts)] if listed else None,
            workflow_runner=_let_through,
        )


def _with_runs(workflows: Sequence[type] | None) -> Sequence[type]:
    """Add the workflows unless they are listed: a client's plugin is applied again for its workers."""
    listed = list(workflows or ())
    return [*listed, *(one for one in (StromaRun, StromaFlow) if one not in listed)]


def _let_through(runner: WorkflowRunner | None) -> WorkflowRunner:
    if isinstance(runner, SandboxedWorkflowRunner):
        restrictions = runner.restrictions.with_passthrough_modules(*_PASSED_THROUGH)
        return dataclasses.replace(runner, restrictions=restrictions)
    return runner or SandboxedWorkflowRunner()


def stroma_worker(
    client: Client,
    task_queue: str,
    pipelines: Iterable[Pipeline],
    *,
    config: RunConfig | None = None,
    registry: ContractRegistry | None = None,
    payloads: BlobStore | str | None = None,
    store: Any = None,
    beat_seconds: float | None = None,
    max_concurrent: int | None = None,
    **options: Any,
) -> Worker:
    """Create a worker that runs pipelines; ``await worker.run()``, or ``async with worker:``.

    ``max_concurrent``: how many attempts at once. ``options`` are those of ``temporalio.worker.Worker``; see
    :class:`StromaPlugin` for the others.
    """
    plugin = StromaPlugin(
        pipelines, config=config, registry=registry, payloads=payloads, store=store, beat_seconds=beat_seconds
    )
    plugins = [*options.pop("plugins", ())]
    if any(isinstance(known, StromaPlugin) for known in client.config(active_config=True)["plugins"]):
        # The client's plugin does the rest for its workers; two of one kind are a warning.
        own = plugin.worker_activities
        options["activities"] = [*options.get("activities", ()), own.node, own.run]
        options["interceptors"] = [*options.get("interceptors", ()), FlowPipelines(plugin.attempts)]
    else:
        plugins.insert(0, plugin)
    if max_concurrent is not None:
        options["max_concurrent_activities"] = max_concurrent
    # A cancellation comes with the answer to a beat, and beats are held back for as long.
    held_back = _HELD_BACK if beat_seconds is None else min(_HELD_BACK, timedelta(seconds=beat_seconds))
    options.setdefault("max_heartbeat_throttle_interval", held_back)
    options.setdefault("default_heartbeat_throttle_interval", held_back)
    # After the loss of a worker its workflows are taken over that much sooner; the default is 10 s.
    options.setdefault("sticky_queue_schedule_to_start_timeout", timedelta(seconds=1))
    return Worker(client, task_queue=task_queue, plugins=plugins, **options)


async def register_search_attributes(client: Client) -> None:
    """Create the search attributes ``StromaPipeline`` and ``StromaStatus`` on the server, once, as an administrator.

    Runs get them where they are registered, and go without where they are not.
    """
    keyword = IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD
    wanted = {names.PIPELINE_KEY.name: keyword, names.STATUS_KEY.name: keyword}
    try:
        await client.operator_service.add_search_attributes(
            AddSearchAttributesRequest(namespace=client.namespace, search_attributes=wanted)
        )
    except RPCError as error:
        if error.status != RPCStatusCode.ALREADY_EXISTS:
            raise
