"""A second driver, in sketch: the seam of ``stroma.drivers.remote`` over DBOS, with its journal in PostgreSQL.

A run is a workflow of DBOS, and each request of its interpreter a step. DBOS numbers steps in the order in which they are
begun, which is not the same again where children of a group race each other; so a step is found by what it is *for* (its
name), never by its number. A workflow that is recovered first reads what it had done, and draws numbers beyond that.

What it cannot do:

- Take over at once on another machine: DBOS recovers the workflows of its own executor when that starts; its console service does so across machines.
- Interrupt a node: DBOS ends a cancelled workflow at its next step.
- Stop a zombie early: two executors with one id both call the node, and the second one's record is refused (by its documentation; not tried).
- Use an id a second time: the second `run()` returns the first one's result, whatever `if_exists` says.
- Resume a failed run, wait for a person, show a live trace: possible, not built.
"""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from typing import Any

from dbos import DBOS, DBOSClient, SetWorkflowID
from dbos._serialization import DBOSPortableJSONSerializer
from pydantic import BaseModel

from stroma import ContractRegistry, Pipeline, RunConfig
from stroma.checkpoint.payloads import BlobStore
from stroma.contracts.node import Node
from stroma.contracts.schema import schema_of
from stroma.drivers.remote.attempts import Attempts
from stroma.drivers.remote.interpreter import Interpreter
from stroma.drivers.remote.plans import KnownNodes, freeze, plain_context
from stroma.drivers.remote.results import broken_of, result_of
from stroma.drivers.remote.state import new_state
from stroma.hooks import HookError
from stroma.runner.pipeline import nodes_of
from stroma.trace import ExecutionResult

__all__ = ["Cluster", "DbosRunner"]


class _Driver:
    """What an interpreter knows of the world: the steps of one workflow."""

    def __init__(self, run_id: str, attempts: Attempts, recorded: dict[str, Any]) -> None:
        self._attempts = attempts
        self._recorded = recorded
        # The draws need not be the same again: how long a wait was is in no step.
        self._random = random.Random(run_id)

    async def ask(self, request: Any) -> tuple[Any, bool]:
        name = _name(request)
        if name in self._recorded:
            return self._recorded.pop(name), False
        value = json.loads(json.dumps(request))
        reply = await DBOS.reserve_step().run_async({"name": name}, self._perform, value)
        return reply, False

    async def _perform(self, request: Any) -> Any:
        return json.loads(json.dumps(await self._attempts.perform(request)))

    async def sleep(self, seconds: float) -> None:
        if not self._recorded:  # Else what came after the wait is known already.
            await asyncio.sleep(seconds)

    def draw(self) -> float:
        return self._random.random()

    def full(self) -> bool:
        return False


def _name(request: Any) -> str:
    """What a step is for: no two requests of one run are for the same."""
    where = (request.get(key, "") for key in ("position", "branch", "attempt", "first"))
    # A map puts its items away as often as they are many: which ones says the rest.
    packed = ",".join(map(str, request.get("indexes", [])[:1])) if request["op"] == "pack" else ""
    return ":".join(map(str, (request["op"], *where, packed)))


class Cluster:
    """This process as one that can run workflows. One at a time: DBOS keeps one of its kind for each process."""

    def __init__(self, dsn: str, name: str = "stroma") -> None:
        serializer = DBOSPortableJSONSerializer()  # Nothing is unpickled that a database says.
        self._client = DBOSClient(system_database_url=dsn, serializer=serializer)
        self._attempts: dict[str, Attempts] = {}
        DBOS(
            config={
                "name": name,
                "system_database_url": dsn,
                "serializer": serializer,
                "run_admin_server": False,
                "log_level": "ERROR",
            }
        )

        @DBOS.workflow(name="stroma.run")
        async def run(value: dict[str, Any]) -> dict[str, Any]:
            return await self._run(value)

        self.workflow = run

    def serve(
        self, pipeline: Pipeline, config: RunConfig | None = None, payloads: BlobStore | None = None
    ) -> None:
        """Let runs of a pipeline be done here: before ``launch``, if there are any that a process left behind."""
        self._attempts[pipeline.name] = Attempts([pipeline], config=config, payloads=payloads)

    def launch(self) -> None:
        """Take up what an earlier process of this machine left behind, and be ready for more."""
        DBOS.launch()

    def close(self) -> None:
        DBOS.destroy(destroy_registry=True)
        self._client.destroy()

    async def _run(self, given: dict[str, Any]) -> dict[str, Any]:
        plan = given["plan"]
        steps = await asyncio.to_thread(self._client.list_workflow_steps, plan["options"]["workflow"])
        for _ in range(max((step["function_id"] for step in steps), default=-1) + 1):
            DBOS.reserve_step()
        recorded = {step["function_name"]: step["output"] for step in steps}
        driver = _Driver(plan["run_id"], self._attempts[plan["pipeline"]], recorded)
        report = await Interpreter(plan, given["state"], driver).run()
        return json.loads(json.dumps(report))


class DbosRunner:
    """Begins runs as workflows, and waits for them."""

    def __init__(self, cluster: Cluster, config: RunConfig, payloads: BlobStore | None = None) -> None:
        self._cluster = cluster
        self._config = config
        self._payloads = payloads

    async def run(
        self, pipeline: Pipeline | list[Node], state: BaseModel, *, run_id: str | None = None
    ) -> ExecutionResult:
        records = nodes_of(pipeline)
        name = pipeline.name if isinstance(pipeline, Pipeline) else self._config.pipeline
        if not isinstance(state, BaseModel):
            raise TypeError(f"the initial state must be a pydantic model, not {type(state).__name__}")
        registry = ContractRegistry()
        known = KnownNodes(name, records, registry)
        run_id = run_id or uuid.uuid4().hex
        options = {"workflow": run_id}
        plan = freeze(name, records, self._config, registry, run_id=run_id, options=options)
        kind = type(state)
        text = schema_of(kind).encode(state).decode()
        value: Any = {
            "text": text,
            "size": len(text),
            "cls": ["class", f"{kind.__module__}:{kind.__qualname__}"],
        }
        started = new_state(value, context=plain_context(dict(self._config.context)))
        with SetWorkflowID(
            run_id
        ):  # The same id again attaches: what it came to is given, nothing runs twice.
            handle = await DBOS.start_workflow_async(
                self._cluster.workflow, json.loads(json.dumps({"plan": plan, "state": started}))
            )
        report = await handle.get_result()
        result = await result_of(report, known, self._payloads)
        broken = broken_of(report, result)
        if broken is not None:
            raise broken
        if result.hook_errors and self._config.hook_errors == "raise":
            raise HookError(f"{len(result.hook_errors)} hook calls raised", result)
        return result
