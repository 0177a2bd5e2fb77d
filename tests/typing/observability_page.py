"""The nodes of the published examples: a bare `-> dict` or `-> tuple`, untyped hooks; all pass."""

# A bare `dict` lacks its type arguments under strict settings. That is between the user and the checker, and
# no business of our decorators.
# mypy: disable-error-code="type-arg, no-untyped-def"
# pyright: reportMissingTypeArgument=false, reportMissingParameterType=false

from pydantic import BaseModel

from stroma import NodeContract, NodeHooks, RunConfig, StromaRunner, stroma_node, stroma_step


class Input(BaseModel):
    value: int


class Output(BaseModel):
    result: int


async def on_start(run_id, node_id, input_state):
    print(run_id, node_id, input_state)


async def on_success(run_id, node_id, output_state, tokens_used):
    print(run_id, node_id, output_state, tokens_used)


async def on_failure(run_id, node_id, exc, failure_class):
    print(run_id, node_id, exc, failure_class)


hooks = NodeHooks(on_node_start=on_start, on_node_success=on_success, on_node_failure=on_failure)
config = RunConfig(hooks=hooks)
runner = StromaRunner.quick(hooks=NodeHooks(on_node_start=on_start, on_node_success=on_success))


@runner.node("double", input=Input, output=Output)
async def double(state: Input) -> dict:
    return {"result": state.value * 2}


@runner.node("with usage", input=Input, output=Output)
async def with_usage(state: Input) -> tuple:
    return {"result": state.value * 2}, 10, 5, "gpt-4o"


@runner.node("with context", input=Input, output=Output)
async def with_context(state: Input, ctx: dict) -> dict:
    return {"result": ctx["factor"] * state.value}


@runner.node("with context and usage", input=Input, output=Output)
async def with_context_and_usage(state: Input, ctx: dict) -> tuple:
    return {"result": ctx["factor"] * state.value}, 10


contract = NodeContract(node_id="marked", input_schema=Input, output_schema=Output)


@stroma_node("marked", contract)
async def marked(state: Input) -> dict:
    return {"result": 1}


@stroma_step("marked", contract=contract)
async def step(state: Input) -> tuple:
    return {"result": 1}, 5


@runner.node("unannotated", input=Input, output=Output)
async def unannotated(state):
    return {"result": state.value}


async def main() -> None:
    result = await runner.run([double, with_usage, with_context, marked, unannotated], Input(value=5))
    print(result.status)
