"""Pipelines, groups, runners, hooks and results as a user writes them, with the types that they have."""

import logging
from collections.abc import Sequence
from typing import Any, assert_type

from pydantic import BaseModel

from stroma import (
    AsyncInMemoryStore,
    CheckpointManager,
    ContractRegistry,
    ExecutionBudget,
    ExecutionResult,
    ExecutionTrace,
    FailureClass,
    FailurePolicy,
    InMemoryStore,
    Journal,
    JsonLines,
    MapProgress,
    NodeContext,
    NodeContract,
    NodeExecution,
    NodeHooks,
    Pipeline,
    ReliabilityContext,
    RunConfig,
    RunStatus,
    RunStream,
    StreamEvent,
    StromaRunner,
    StromaStep,
    TraceEvent,
    classify,
    current_node,
    current_node_or_none,
    default_policy_map,
    execute_step,
    map_over,
    parallel,
    stroma_node,
)
from stroma.failures import PolicyMap


class Document(BaseModel):
    text: str


class Documents(BaseModel):
    documents: list[Document]


class Summary(BaseModel):
    summary: str


class Risk(BaseModel):
    risk: float


class Report(BaseModel):
    summary: str
    risk: float


runner = StromaRunner.quick()


@runner.node("summarise", input=Document, output=Summary)
async def summarise(state: Document) -> Summary:
    return Summary(summary=state.text[:10])


@runner.node("risk", input=Document, output=Risk)
async def risk(state: Document) -> dict[str, Any]:
    return {"risk": 0.5}


@runner.node("report", input=Report, output=Report)
def report(state: Report) -> Report:
    return state


# ---------------------------------------------------------------------- pipelines and groups

both = parallel(summarise, risk)
bounded = parallel(summarise, parallel(risk, report), max_concurrency=2)
each = map_over("documents", summarise, into="summaries", max_concurrency=8)
in_turn = map_over("documents", [summarise, summarise], into="summaries")
of_file = map_over(JsonLines("in.jsonl"), summarise, into=JsonLines(field="out"), on_item_failure="collect")
of_function = map_over(lambda state: [state], summarise, into=Journal())
map_over("documents", summarise, into="x", on_item_failure="skip")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
map_over(3, summarise, into="x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
pipeline = Pipeline("reports", [both, report])
configured = Pipeline("reports", (both, report), config=RunConfig(budget=ExecutionBudget(max_cost_usd=1.0)))
assert_type(pipeline, Pipeline)
assert_type(pipeline.name, str)
assert_type(pipeline.config, RunConfig | None)
Pipeline(5, [report])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
map_over("documents", summarise)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
parallel(summarise, max_concurrency="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def run_them() -> None:
    """A run takes a list, a tuple or a Pipeline, and gives an ExecutionResult."""
    document = Document(text="x")
    async with runner.stream([both, report], document) as stream:
        async for notice in stream:
            assert_type(notice, StreamEvent)
            assert_type(notice.event, TraceEvent | None)
            assert_type(notice.progress, MapProgress | None)
    assert_type(stream, RunStream)
    assert_type(stream.result, ExecutionResult)
    assert_type(runner.run_sync([both], document), ExecutionResult)
    async for index, _ in runner.map_outputs("run", of_file):
        assert_type(index, int)
    result = await runner.run([both, report], document)
    assert_type(result, ExecutionResult)
    assert_type(result.status, RunStatus)
    assert_type(result.final_state, BaseModel | None)
    assert_type(result.trace, ExecutionTrace)
    assert_type(result.total_cost_usd, float)
    assert_type(result.total_tokens, int)
    for event in result.trace:
        assert_type(event, TraceEvent)
        assert_type(event.output_state, dict[str, Any] | None)
    await runner.run((each,), Documents(documents=[document]), run_id="r", context={"client": object()})
    await runner.run(pipeline, document, resume=True)
    await runner.run([report], {"text": "x"})  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    runner.run([report], document)  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    merged = await both(document)
    assert_type(merged, dict[str, Any])


# ---------------------------------------------------------------------- runners


def classifier(exc: Exception, context: NodeContext) -> FailureClass | None:
    return FailureClass.TERMINAL if isinstance(exc, KeyError) and context.attempt > 1 else None


policies: PolicyMap = default_policy_map() | {FailureClass.AMBIGUOUS: FailurePolicy(max_retries=0)}
built = (
    StromaRunner.quick(store=InMemoryStore(), budget=ExecutionBudget(max_tokens_total=1000), run_id="r")
    .with_budget(tokens=1000, cost_usd=0.5, latency_ms=1000)
    .with_model_fallback("gpt-4o", to="gpt-4o-mini", at_budget_pct=0.5)
    .with_classifiers([classifier])
    .with_hooks(NodeHooks())
    .with_context({"client": object()})
    .with_policy_map(policies)
    .with_node_policies({"risk": policies})
    .with_node_timeouts({"risk": 1000})
)
assert_type(built, StromaRunner)
explicit = StromaRunner(ContractRegistry(), CheckpointManager(AsyncInMemoryStore()), RunConfig())
assert_type(classify(ValueError(), NodeContext("n", 1, "r"), [classifier]), FailureClass)


class CustomStore:
    """A store of the simple protocol needs no base class."""

    def save(self, run_id: str, node_id: str, state: BaseModel) -> None: ...
    def load(self, run_id: str, node_id: str) -> BaseModel | None:
        return None

    def delete(self, run_id: str) -> None: ...


class AsyncCustomStore:
    async def save(self, run_id: str, node_id: str, state: BaseModel) -> None: ...
    async def load(self, run_id: str, node_id: str) -> BaseModel | None:
        return None

    async def delete(self, run_id: str) -> None: ...


StromaRunner.quick(store=CustomStore())
StromaRunner.quick(store=AsyncCustomStore())
CheckpointManager(CustomStore())
StromaRunner.quick(store={})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

# ---------------------------------------------------------------------- hooks


async def on_start(run_id: str, node_id: str, state: dict[str, Any]) -> None:
    here = current_node()
    assert_type(here, NodeExecution)
    assert_type(current_node_or_none(), NodeExecution | None)
    if here.attempt > 1:
        logging.info("%s %s %d %s", here.run_id, here.pipeline, here.attempt, here.idempotency_key)
        here.report_usage(input_tokens=5, model="gpt-4o")


async def on_success(run_id: str, node_id: str, state: dict[str, Any], tokens_used: int) -> None: ...
async def on_failure(run_id: str, node_id: str, exc: Exception, failure_class: FailureClass) -> None: ...
async def on_end(run_id: str, result: ExecutionResult) -> None: ...
def not_async(run_id: str, node_id: str, state: dict[str, Any]) -> None: ...


one = NodeHooks(
    on_node_start=on_start, on_node_success=on_success, on_node_failure=on_failure, on_run_end=on_end
)
sets: Sequence[NodeHooks] = one | NodeHooks() | [one]
StromaRunner.quick(hooks=one)
StromaRunner.quick(hooks=[one, NodeHooks()])
StromaRunner.quick(hooks=sets).with_hooks(one | one)
RunConfig(hooks=one)
RunConfig(hooks=[one, one])
NodeHooks(on_node_start=not_async)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
NodeHooks(on_node_start=on_success)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

# ---------------------------------------------------------------------- steps


async def steps() -> None:
    """Single steps around the engine, as in code that has its own loop."""
    ctx = ReliabilityContext.for_run(RunConfig(), ContractRegistry(), CheckpointManager(InMemoryStore()))
    contract = NodeContract(node_id="summarise", input_schema=Document, output_schema=Summary)
    result = await execute_step("summarise", summarise, Document(text="x"), ctx, contract=contract)
    assert_type(result, ExecutionResult)
    step = StromaStep(ctx)

    @step("risk", input=Document, output=Risk)
    async def risk(state: Document) -> Risk:
        return Risk(risk=1)

    assert_type(await risk(Document(text="x")), ExecutionResult)
    wrapped = step.wrap("summarise", summarise, contract=contract)
    assert_type(await wrapped(Document(text="x")), ExecutionResult)


@stroma_node("bare", NodeContract(node_id="bare", input_schema=Document, output_schema=Summary))
async def inline_contract(state: Document) -> Summary:
    return Summary(summary=state.text)
