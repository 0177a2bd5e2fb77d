"""A driver without any machinery: each request is done at once, in this process. What crosses it is JSON all the same."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator
from time import time_ns
from typing import Any

from pydantic import BaseModel

from stroma import ContractRegistry, Pipeline, RunConfig
from stroma.contracts.schema import schema_of
from stroma.drivers.remote.attempts import Attempts
from stroma.drivers.remote.flow_bodies import FlowSite
from stroma.drivers.remote.interpreter import Interpreter
from stroma.drivers.remote.plans import KnownNodes, freeze
from stroma.drivers.remote.results import broken_of, result_of
from stroma.drivers.remote.state import Continue, new_state
from stroma.drivers.remote.wire import fold, unfold
from stroma.trace import ExecutionResult


class Seam:
    """A run by the interpreter alone, with a fresh one from its own state after every position, or never."""

    def __init__(self, attempts: Attempts, *, full: bool = True) -> None:
        self._attempts = attempts
        self._full = full
        self.requests: list[dict[str, Any]] = []
        self.replies: list[dict[str, Any]] = []

    async def ask(self, request: Any) -> tuple[Any, bool]:
        request = json.loads(json.dumps(request))
        self.requests.append(request)
        reply = json.loads(json.dumps(await self._attempts.perform(request)))
        self.replies.append(reply)
        return reply, False

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def draw(self) -> float:
        return random.random()

    def full(self) -> bool:
        return self._full

    def site(self, pipeline: str) -> FlowSite:
        return self._attempts.site(pipeline)

    def now_ms(self) -> int:
        return time_ns() // 1_000_000

    def is_replaying(self) -> bool:
        return False


class SeamRunner:
    def __init__(self, attempts: Attempts, config: RunConfig, *, full: bool = True) -> None:
        self.seam = Seam(attempts, full=full)
        self._payloads = attempts.site(next(iter(attempts._known))).payloads
        self._config = config
        #: The state of the run that is under way.
        self.state: Any = None

    async def run(
        self, pipeline: Pipeline, state: BaseModel, *, run_id: str = "run", traceparent: str | None = None
    ) -> ExecutionResult:
        known = KnownNodes.of(pipeline, ContractRegistry())
        plan = freeze(pipeline.name, known.nodes, self._config, known.registry, run_id=run_id)
        kind = type(state)
        text = schema_of(kind).encode(state).decode()
        value: Any = {
            "text": text,
            "size": len(text),
            "cls": ["class", f"{kind.__module__}:{kind.__qualname__}"],
        }
        at = new_state(value, context=dict(self._config.context), traceparent=traceparent)
        while True:
            self.state = at
            try:
                report = await Interpreter(plan, at, self.seam, self.seam).run()
                break
            except Continue:
                at = unfold(json.loads(json.dumps(fold(at))))
        result = await result_of(json.loads(json.dumps(report)), known, self._payloads)
        broken = broken_of(report, result)
        if broken is not None:
            raise broken
        return result


class SeamDriver:
    name = "seam"

    @contextlib.asynccontextmanager
    async def bind(self, nodes: list[Any], **config: Any) -> AsyncIterator[Any]:
        from tests.drivers.conftest import Bound

        pipeline, settings = Pipeline("pipe", nodes), RunConfig(**config)
        yield Bound(SeamRunner(Attempts([pipeline], config=settings), settings), pipeline, self.name)
