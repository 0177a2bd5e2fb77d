"""Code written against the published 0.3 surface runs unchanged: each name, parameter, default and remark.

`published_surface.txt` is that surface. Additions are welcome, so the tests ask only that everything in it
is there: the same modules, the same names, the published parameters in their order with their defaults, and
no new one that is required.
"""

import ast
import dataclasses
import importlib
import inspect
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from tests.kit import NEVER, AsyncSimpleStore, SimpleStore, returning, words
from tests.servers import RedisServer, shared_redis

import stroma
from stroma import (
    AsyncCheckpointStore,
    AsyncInMemoryStore,
    BoundaryValidator,
    CheckpointManager,
    CheckpointStore,
    ContractRegistry,
    ContractViolation,
    CostTracker,
    ExecutionBudget,
    ExecutionResult,
    ExecutionTrace,
    FailureClass,
    FailurePolicy,
    FallbackPolicy,
    InMemoryStore,
    ModelHint,
    NodeContext,
    NodeContract,
    NodeHooks,
    NodeUsage,
    RedisStore,
    ReliabilityContext,
    RetryBudget,
    RunConfig,
    RunStatus,
    StromaRunner,
    SyncRedisStore,
    TraceEvent,
    checkpoint,
    default_policy_map,
    estimate_cost_usd,
    stroma_node,
    stroma_step,
)
from stroma.checkpoint import CheckpointKey, resolve_schema, schema_ref
from stroma.engine.config import RunConfigFields

_STUBS = Path(__file__).with_name("published_surface.txt").read_text("utf-8")
#: Stubs by module. A class lists its fields (with defaults) and methods; `X = Y` says that X is Y.
SURFACE = dict(re.findall(r"^\[(\w+)\]\n(.*?)(?=^\[|\Z)", _STUBS, re.MULTILINE | re.DOTALL))
#: Names that are values or aliases, by module; and those that need not be in `stroma` itself.
VALUES = {"cost": ["KNOWN_MODELS"], "failures": ["Classifier"]}
MODULE_ONLY = {
    "failures": ["PolicyMap"],
    "checkpoint": ["CheckpointKey", "schema_ref", "_schema_ref", "resolve_schema", "_resolve_schema"],
}
#: Names that a module has besides its own, because the published one imported them; and those of the
#: adapters.
_BOTH = (
    "CheckpointManager Classifier ContractRegistry ExecutionBudget ExecutionResult FailureClass "
    "FallbackPolicy NodeContext "
    "NodeContract NodeUsage PolicyMap RunStatus TraceEvent classify default_policy_map estimate_cost_usd "
    "resolve_model"
)
ALSO_IN = {
    "failures": "BudgetExceeded ContractViolation",
    "trace": "FailureClass",
    "runner": f"{_BOTH} ReliabilityContext",
    "middleware": f"{_BOTH} CostTracker ExecutionTrace RetryBudget",
    "adapters.base": "FrameworkAdapter LoopAdapter NodeContract StepInterceptor TurnAdapter "
    "extract_state_dict",
}


def names_in(module: str) -> Iterator[tuple[str, ast.stmt]]:
    for statement in ast.parse(SURFACE[module]).body:
        if isinstance(statement, ast.Assign):
            target = statement.targets[0]
            assert isinstance(target, ast.Name)
            yield target.id, statement
        else:
            assert isinstance(statement, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            yield statement.name, statement


PUBLIC = [(module, name) for module in SURFACE for name, _ in names_in(module)] + [
    (module, name) for module, names in VALUES.items() for name in names
]
FUNCTIONS = [
    (module, name, statement)
    for module in SURFACE
    for name, statement in names_in(module)
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef))
]
CLASSES = [
    (module, name, statement)
    for module in SURFACE
    for name, statement in names_in(module)
    if isinstance(statement, ast.ClassDef)
]
CALLABLES = FUNCTIONS + [
    (module, f"{name}.{method.name}", method)
    for module, name, statement in CLASSES
    for method in statement.body
    if isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef))
]
ALIASES = [
    (name, statement.value.id)
    for module in SURFACE
    for name, statement in names_in(module)
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name)
]


def published_signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> inspect.Signature:
    """The signature that the stub of a function has, `self` and `cls` left out."""
    copied = ast.parse(ast.unparse(function)).body[0]
    assert isinstance(copied, (ast.FunctionDef, ast.AsyncFunctionDef))
    copied.decorator_list = []
    namespace: dict[str, Any] = {}
    exec(compile(ast.unparse(copied), "surface", "exec"), namespace)
    signature = inspect.signature(namespace[function.name])
    entries = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    return signature.replace(parameters=entries)


def find(module: str, dotted: str) -> Any:
    outcome: Any = importlib.import_module(f"stroma.{module}")
    for name in dotted.split("."):
        outcome = (
            inspect.getattr_static(outcome, name) if inspect.isclass(outcome) else getattr(outcome, name)
        )
    return outcome


def assert_callable_as_published(
    module: str, dotted: str, stub: ast.FunctionDef | ast.AsyncFunctionDef
) -> None:
    ours = find(module, dotted)
    decorators = {ast.unparse(d) for d in stub.decorator_list}
    if decorators == {"property"}:
        assert isinstance(ours, property)
        return
    if "." in dotted:
        assert isinstance(ours, classmethod) == (decorators == {"classmethod"}), dotted
    function = ours.__func__ if isinstance(ours, classmethod) else ours
    awaited = inspect.iscoroutinefunction(function)
    assert awaited == isinstance(stub, ast.AsyncFunctionDef), f"{dotted} is async: {awaited}"
    theirs = list(published_signature(stub).parameters.values())
    mine = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
    by_name = {p.name: p for p in mine}
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    for parameter in theirs:
        assert parameter.name in by_name, f"{dotted} lost {parameter.name}"
        assert by_name[parameter.name].kind is parameter.kind, f"{dotted}: {parameter.name}"
        if parameter.default is not inspect.Parameter.empty:
            assert by_name[parameter.name].default == parameter.default, f"{dotted}: {parameter.name}"
    expected = [p.name for p in theirs if p.kind in positional]
    assert [p.name for p in mine if p.kind in positional][: len(expected)] == expected, dotted
    for parameter in mine:
        if parameter.name not in {p.name for p in theirs}:
            optional = parameter.default is not inspect.Parameter.empty
            variable = parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
            assert optional or variable, f"{dotted} now requires {parameter.name}"


class A(BaseModel):
    value: int


class B(BaseModel):
    result: int


class Item(BaseModel):
    price: float
    name: str


class Order(BaseModel):
    items: list[Item]
    note: str | None = None


def contract(
    node_id: str = "n", given: type[BaseModel] = A, promised: type[BaseModel] = B
) -> NodeContract[Any, Any]:
    return NodeContract(node_id=node_id, input_schema=given, output_schema=promised)


def event(node_id: str = "node1", attempt: int = 1, **fields: Any) -> TraceEvent:
    inputs: dict[str, Any] = {
        "run_id": "r",
        "timestamp_utc": datetime.now(UTC),
        "input_state": {"value": 1},
        "output_state": {"result": 2},
        "duration_ms": 3,
    }
    return TraceEvent(node_id=node_id, attempt=attempt, **(inputs | fields))


# ---------------------------------------------------------------------- names, parameters, defaults


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_every_name_has_its_module_and_is_importable_from_stroma(module: str, name: str) -> None:
    """Every published name can be imported from its module, and the same object from `stroma`."""
    home = importlib.import_module(f"stroma.{module}")
    assert hasattr(home, name), f"from stroma.{module} import {name} fails"
    assert getattr(stroma, name) is getattr(home, name)
    assert name in stroma.__all__


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in MODULE_ONLY.items() for n in names])
def test_module_only_names(module: str, name: str) -> None:
    """A few published names live in their module alone."""
    assert hasattr(importlib.import_module(f"stroma.{module}"), name)


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in ALSO_IN.items() for n in names.split()])
def test_a_module_has_the_names_that_the_published_one_imported(module: str, name: str) -> None:
    """Programs may import a published name from every module that had it, and get the object of `stroma`."""
    namespace: dict[str, Any] = {}
    exec(f"from stroma.{module} import {name}", namespace)
    assert namespace[name] is getattr(stroma, name, namespace[name])


def test_all_is_sorted_and_complete() -> None:
    """`stroma.__all__` is sorted (constants, classes, functions), free of repeats, and each name loads."""

    def group(name: str) -> tuple[int, str]:
        return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)

    assert stroma.__all__ == sorted(set(stroma.__all__), key=group)
    assert all(getattr(stroma, name) is not None for name in stroma.__all__)
    assert set(stroma.__all__) <= set(dir(stroma))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = stroma.nonsense


@pytest.mark.parametrize(("name", "meaning"), ALIASES)
def test_step_names_are_the_node_names(name: str, meaning: str) -> None:
    """Every Step* name is the Node* object itself."""
    assert getattr(stroma, name) is getattr(stroma, meaning)


@pytest.mark.parametrize(
    ("module", "name", "stub"), [pytest.param(*m, id=f"{m[0]}.{m[1]}") for m in CALLABLES]
)
def test_signatures(module: str, name: str, stub: Any) -> None:
    """A published function or method has its kind, parameters and defaults; none is newly required."""
    assert_callable_as_published(module, name, stub)


@pytest.mark.parametrize(
    ("module", "name", "stub"),
    [
        pytest.param(*c, id=f"{c[0]}.{c[1]}")
        for c in CLASSES
        if any(isinstance(s, ast.AnnAssign) for s in c[2].body)
    ],
)
def test_fields(module: str, name: str, stub: ast.ClassDef) -> None:
    """Every published record (model or dataclass) is unchanged, with fields in order and their defaults."""
    cls = find(module, name)
    published: dict[str, Any] = {}
    for line in stub.body:
        if isinstance(line, ast.AnnAssign):
            assert isinstance(line.target, ast.Name)
            published[line.target.id] = None if line.value is None else ast.literal_eval(line.value)
    required = [
        line.target.id
        for line in stub.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is None
    ]
    is_model = [ast.unparse(base) for base in stub.bases] == ["BaseModel"]
    assert issubclass(cls, BaseModel) == is_model
    assert dataclasses.is_dataclass(cls) == (not is_model)
    ours: dict[str, Any] = {}  # name: its default, ... for a factory; absent from it if required
    if is_model:
        order = list(cls.model_fields)
        for field_name, info in cls.model_fields.items():
            if not info.is_required():
                ours[field_name] = ... if info.default_factory is not None else info.default
    else:
        order = [f.name for f in dataclasses.fields(cls)]
        for f in dataclasses.fields(cls):
            if f.default is not dataclasses.MISSING:
                ours[f.name] = f.default
            elif f.default_factory is not dataclasses.MISSING:
                ours[f.name] = ...
        assert order[: len(published)] == list(published), "the published fields come first, in their order"
    for field_name, default in published.items():
        assert field_name in order
        if field_name not in required:
            assert ours[field_name] == default
    assert [n for n in order if n not in published and n not in ours] == [], "a new field needs a default"


async def _hook(*_: Any) -> None: ...


def test_published_dataclasses_stay_mutable() -> None:
    """The published records stay what they were: plain dataclasses that code may change."""
    for record in (
        NodeUsage("n", 1, 0.0, 1),
        ModelHint("n", "m"),
        FallbackPolicy("a", "b"),
        NodeContext("n", 1, "r"),
        event(),
        NodeHooks(),
    ):
        field = dataclasses.fields(record)[0].name
        value = _hook if isinstance(record, NodeHooks) else "changed"
        setattr(record, field, value)
        assert getattr(record, field) == value
        assert record == dataclasses.replace(record)


# ---------------------------------------------------------------------- contracts


def test_node_contract_is_a_model_and_generic() -> None:
    """NodeContract(node_id=, input_schema=, output_schema=) is a model; NodeContract[In, Out] works too."""
    plain = NodeContract(node_id="n", input_schema=A, output_schema=B)
    assert (plain.node_id, plain.input_schema, plain.output_schema) == ("n", A, B)
    typed = NodeContract[A, B](node_id="n", input_schema=A, output_schema=B)
    assert isinstance(typed, NodeContract)
    assert typed.input_schema is A
    with pytest.raises(ValidationError):
        NodeContract(node_id="n", input_schema=int, output_schema=B)  # type: ignore[type-var]


def violation(given: Any, schema: type[BaseModel] = Order, direction: Any = "output") -> ContractViolation:
    with pytest.raises(ContractViolation) as caught:
        BoundaryValidator()(contract("search", schema, schema), direction, given)
    return caught.value


def test_violation_text() -> None:
    """A violation reads Contract violation for 'search' (output): dotted.path: message; and so on."""
    broken = violation({"items": [{"price": "x", "name": "a"}, {"price": 1}]})
    assert str(broken) == (
        "Contract violation for 'search' (output): "
        "items.0.price: Input should be a valid number, unable to parse string as a number; "
        "items.1.name: Field required"
    )
    assert str(violation({"items": 5}, direction="input")) == (
        "Contract violation for 'search' (input): items: Input should be a valid list"
    )


def test_violation_text_shows_five_errors() -> None:
    """The text of a violation has the first five errors, then how many more there are."""
    seven = violation({"items": [{"price": 1}] * 7})
    assert len(seven.errors) == 7
    shown = [f"items.{i}.name: Field required" for i in range(5)]
    assert str(seven) == f"Contract violation for 'search' (output): {'; '.join(shown)}; ... and 2 more"
    five = violation({"items": [{"price": 1}] * 5})
    assert str(five) == f"Contract violation for 'search' (output): {'; '.join(shown)}"


def test_violation_is_made_by_position_or_name() -> None:
    """ContractViolation(node_id, direction, raw, errors) can be made by hand."""
    errors = [{"loc": ("a", "b"), "msg": "wrong"}, {"loc": (), "msg": "all wrong"}]
    instance = ContractViolation("search", "input", {"a": 1}, errors)
    assert instance.errors is errors
    assert str(instance) == "Contract violation for 'search' (input): a.b: wrong; all wrong"
    assert str(ContractViolation(node_id="s", direction="input", raw={}, errors=[])).startswith(
        "Contract violation"
    )


def test_boundary_validator() -> None:
    """BoundaryValidator()(contract, direction, raw) gives the validated model of that side."""
    validate = BoundaryValidator()
    assert validate(contract(), "input", {"value": "5"}) == A(value=5)
    assert validate(contract(), "output", {"result": 6}) == B(result=6)


def test_registry() -> None:
    """A registry gives contracts by id (KeyError for an unknown one), replaces on register, and validates."""
    registry = ContractRegistry()
    with pytest.raises(KeyError, match="n"):
        registry.get("n")
    with pytest.raises(KeyError):
        registry.validate_input("n", {})
    first, second = contract(promised=A), contract(promised=B)
    registry.register(first)
    assert registry.get("n") is first
    registry.register(second)
    assert registry.get("n") is second
    assert registry.validate_input("n", {"value": "1"}) == A(value=1)
    assert registry.validate_output("n", {"result": 2}) == B(result=2)
    with pytest.raises(ContractViolation) as caught:
        registry.validate_output("n", {"value": 1})
    assert (caught.value.node_id, caught.value.direction) == ("n", "output")


# ---------------------------------------------------------------------- cost


def test_an_unknown_model_costs_nothing() -> None:
    """estimate_cost_usd is 0.0 for a model nobody knows, and knows the price data for the others."""
    assert estimate_cost_usd("nobody/knows-this", 10**6, 10**6) == 0.0
    assert estimate_cost_usd("gpt-3.5-turbo", 10**6) > 0  # Not in KNOWN_MODELS at the start.


# ---------------------------------------------------------------------- trace


def test_append_keeps_the_very_object() -> None:
    """append keeps the very event; it stands in `_events`, in iteration and in replay, in recorded order."""
    recorded = ExecutionTrace()
    assert len(recorded) == 0
    first, second = event("a"), event("b")
    recorded.append(first)
    recorded.append(second)
    for events in (recorded._events, list(recorded), list(recorded.replay())):
        assert isinstance(events, list)
        assert len(events) == 2
        assert events[0] is first
        assert events[1] is second
    assert len(recorded) == 2


async def test_events_of_a_run_keep_their_identity() -> None:
    """Whoever looks at a run's trace is given the same event objects, also beside appended ones."""
    runner = StromaRunner.quick()

    n = runner.node("n", input=A, output=B)(returning({"result": 1}))
    result = await runner.run([n], A(value=1))
    extra = event("extra")
    result.trace.append(extra)
    one, two = result.trace
    assert one is result.trace._events[0] is next(result.trace.replay()) is result.trace.events_for("n")[0]
    assert two is extra
    assert one.timestamp_utc.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - one.timestamp_utc) < timedelta(minutes=1)


def test_to_json_of_undecodable_names() -> None:
    """to_json can be written to a file as UTF-8, also when a message holds an undecodable file name."""
    recorded = ExecutionTrace()
    recorded.append(event(failure=FailureClass.AMBIGUOUS, failure_message="no such file: caf\udce9.txt"))
    text = recorded.to_json()
    assert json.loads(text.encode().decode())[0]["failure_message"].startswith("no such file: caf")


def test_diff_of_awkward_states() -> None:
    """diff takes two NaN for the same, and does not stumble over any value."""
    one, two = ExecutionTrace(), ExecutionTrace()
    state = {"nan": math.nan, "set": {3, "a", None}, "class": Order, "keys": {(1, 2): 10**400}, "c": 1 + 2j}
    one.append(event(input_state=state))
    two.append(event(input_state=dict(state)))
    assert one.diff(two) == []


# ---------------------------------------------------------------------- checkpoints


async def settle(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


STORES = [InMemoryStore, AsyncInMemoryStore]
stores = pytest.mark.parametrize("make", STORES)


def test_store_protocols_are_runtime_checkable() -> None:
    """CheckpointStore and AsyncCheckpointStore are runtime-checkable protocols that custom stores satisfy."""
    assert isinstance(SimpleStore(), CheckpointStore)
    assert isinstance(AsyncSimpleStore(), AsyncCheckpointStore)
    assert isinstance(InMemoryStore(), CheckpointStore)
    assert isinstance(AsyncInMemoryStore(), AsyncCheckpointStore)
    assert isinstance(RedisStore("redis://127.0.0.1:1"), AsyncCheckpointStore)
    assert isinstance(SyncRedisStore("redis://127.0.0.1:1"), CheckpointStore)
    assert not isinstance(object(), CheckpointStore)
    assert not isinstance({}, AsyncCheckpointStore)


@stores
async def test_typed_calls(make: Any) -> None:
    """save_typed coerces to the schema; load_typed gives an instance of the schema, None if absent."""
    store = make()

    class Wide(BaseModel):
        value: str
        extra: int = 0

    assert await settle(store.load_typed("r", "n", A)) is None
    await settle(store.save_typed("r", "n", Wide(value="7"), A))
    loaded = await settle(store.load_typed("r", "n", A))
    assert loaded == A(value=7)
    assert type(loaded) is A
    assert await settle(store.load("r", "n")) == A(value=7)
    with pytest.raises(TypeError):
        await settle(store.load_typed("r", "n", B))


@pytest.mark.parametrize("make", [*STORES, RedisStore, SyncRedisStore])
async def test_save_typed_refuses_what_is_no_schema(make: Any) -> None:
    """save_typed raises TypeError("schema must be a BaseModel type") and saves nothing; it asks no server."""
    store = make() if make in STORES else make("redis://127.0.0.1:1")
    for schema in (int, "A", None, A(value=1), list[int]):
        with pytest.raises(TypeError) as caught:
            await settle(store.save_typed("r", "n", A(value=1), schema))
        assert str(caught.value) == "schema must be a BaseModel type"
    assert make not in STORES or await settle(store.load("r", "n")) is None


@pytest.mark.parametrize("make", [SimpleStore, AsyncSimpleStore, *STORES])
async def test_checkpoint_manager(make: Any) -> None:
    """A manager saves, resumes as a schema (None if absent) and clears by sync and async stores."""
    manager = CheckpointManager(make())
    assert await manager.resume("r", "n", A) is None
    await manager.checkpoint("r", "n", A(value=5))
    await manager.checkpoint("r2", "n", A(value=6))
    assert await manager.resume("r", "n", A) == A(value=5)
    with pytest.raises(TypeError):
        await manager.resume("r", "n", B)
    await manager.clear("r")
    assert await manager.resume("r", "n", A) is None
    assert await manager.resume("r2", "n", A) == A(value=6)


async def test_manager_awaits_any_awaitable() -> None:
    """A store whose plain methods return awaitables is awaited too."""
    import asyncio

    class Futures(SimpleStore):
        def save(self, run_id: str, node_id: str, state: BaseModel) -> Any:
            super().save(run_id, node_id, state)
            return asyncio.ensure_future(asyncio.sleep(0))

        def load(self, run_id: str, node_id: str) -> Any:
            async def later() -> BaseModel | None:
                return SimpleStore.load(self, run_id, node_id)

            return later()

    manager = CheckpointManager(Futures())
    await manager.checkpoint("r", "n", A(value=5))
    assert await manager.resume("r", "n", A) == A(value=5)


async def test_manager_prefers_load_typed() -> None:
    """resume uses load_typed where a store has one."""

    class Typed(SimpleStore):
        def load_typed(self, run_id: str, node_id: str, schema: type[BaseModel]) -> BaseModel | None:
            return schema.model_validate({"value": 9})

    assert await CheckpointManager(Typed()).resume("r", "n", A) == A(value=9)


@pytest.mark.parametrize("make", [SimpleStore, AsyncSimpleStore])
async def test_a_run_keeps_checkpoints_in_a_custom_store(make: Any) -> None:
    """A run saves each node's output under its id in a store of the simple protocol."""
    store = make()
    runner = StromaRunner.quick(store=store, run_id="r")

    @runner.node("n", input=A, output=B)
    async def n(state: A) -> Any:
        return {"result": state.value + 1}

    await runner.run([n], A(value=1))
    assert await settle(store.load("r", "n")) == B(result=2)


class Outer:
    class Inner(BaseModel):
        x: int


def test_references() -> None:
    """schema_ref is "module:qualname"; resolve_schema finds an imported model, and refuses another thing.

    CheckpointKey is a named tuple of run id and node id; the private names are the same functions.
    """
    assert schema_ref(Outer.Inner) == f"{__name__}:Outer.Inner"
    assert resolve_schema("stroma.cost:ExecutionBudget") is ExecutionBudget
    assert resolve_schema(schema_ref(RunConfig)) is RunConfig
    for ref in ("json:dumps", "stroma.trace:TraceEvent", "stroma.cost:KNOWN_MODELS"):
        with pytest.raises(TypeError) as caught:
            resolve_schema(ref)
        assert str(caught.value) == "resolved schema is not a BaseModel"
    key = CheckpointKey("r", "n")
    assert (key, key.run_id, key.node_id) == (("r", "n"), "r", "n")
    assert checkpoint._schema_ref is schema_ref
    assert checkpoint._resolve_schema is resolve_schema


class TestRedisWithoutTheDriver:
    """What happens where `redis` cannot be imported."""

    @pytest.fixture(autouse=True, params=["not installed", "broken"])
    def no_redis(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "redis"]:
            monkeypatch.delitem(sys.modules, name)
        if request.param == "not installed":
            monkeypatch.setitem(sys.modules, "redis", None)
            return

        class Broken:
            def find_spec(self, name: str, *_: Any) -> None:
                if name.partition(".")[0] == "redis":
                    raise OSError("libssl is missing")

        monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])

    @pytest.mark.parametrize("make", [RedisStore, SyncRedisStore])
    def test_import_error(self, make: Any) -> None:
        """Any failure to import redis gives an ImportError with the store and the install line."""
        with pytest.raises(ImportError) as caught:
            make("redis://localhost")
        assert str(caught.value).startswith(f"redis is required for {make.__name__}")
        assert "pip install 'stroma-runner[redis]'" in str(caught.value)
        assert caught.value.__cause__ is not None

    def test_with_redis(self) -> None:
        """with_redis raises it too, and leaves the runner as it was."""
        runner = StromaRunner.quick()
        before = runner.checkpoint_manager
        with pytest.raises(ImportError, match=r"^redis is required for RedisStore"):
            runner.with_redis("redis://localhost")
        assert runner.checkpoint_manager is before


class TestRedisWithoutAServer:
    """What the Redis stores do before they talk to a server, and what they say to one."""

    @pytest.mark.parametrize("make", [RedisStore, SyncRedisStore])
    async def test_no_connection_is_made_at_construction(self, make: Any) -> None:
        """A Redis store is made without a server; ttl_seconds is 3600 unless given."""
        make("redis://127.0.0.1:1")
        make("redis://127.0.0.1:1", 5)
        make(redis_url="redis://127.0.0.1:1", ttl_seconds=5)

    def test_with_redis(self) -> None:
        """with_redis puts a RedisStore behind the runner and returns the runner."""
        runner = StromaRunner.quick()
        before = runner.checkpoint_manager
        assert runner.with_redis("redis://127.0.0.1:1", 60) is runner
        assert isinstance(runner.checkpoint_manager.store, RedisStore)
        assert runner.checkpoint_manager is not before

    @pytest.fixture
    def server(self) -> RedisServer:
        outcome = shared_redis()
        outcome.execute("FLUSHALL")
        return outcome

    @pytest.mark.slow
    @pytest.mark.parametrize("make", [RedisStore, SyncRedisStore])
    async def test_round_trip(self, make: Any, server: RedisServer) -> None:
        """A Redis store loads what it saved (None if absent), deletes one run only, and renews the ttl."""
        store = make(server.url, ttl_seconds=60)
        assert await settle(store.load("r", "n")) is None
        await settle(store.save("r", "n", Plain(value=5)))
        assert {server.execute("TTL", key) for key in server.execute("KEYS", "*")} <= {59, 60}
        await settle(store.save("r:n", "x", Plain(value=7)))
        await settle(store.save_typed("r", "typed", Plain(value=6), Other))
        assert {server.execute("TTL", key) for key in server.execute("KEYS", "*")} <= {59, 60}
        assert await settle(store.load("r", "n")) == Plain(value=5)
        assert await settle(store.load_typed("r", "n", Other)) == Other(value=5)
        assert await settle(store.load_typed("r", "typed", Other)) == Other(value=6)
        assert await settle(store.load_typed("r", "nobody", Other)) is None
        await settle(store.delete("r"))
        assert await settle(store.load("r", "n")) is None
        assert await settle(store.load("r", "typed")) is None
        assert await settle(store.load("r:n", "x")) == Plain(value=7)
        store.close()

    @pytest.mark.slow
    @pytest.mark.parametrize("make", [RedisStore, SyncRedisStore])
    @pytest.mark.parametrize("bad", [b"garbage", b'{"schema": "this:s", "state": "{}"}', b"{}", b"[1]"])
    async def test_what_cannot_be_read_back_is_a_type_error(
        self, make: Any, bad: bytes, server: RedisServer
    ) -> None:
        """What is not a state of ours is a CorruptCheckpoint, which is a TypeError; nothing is imported."""
        store = make(server.url)
        await settle(store.save("r", "n", Plain(value=5)))
        for key in server.execute("KEYS", "*"):
            server.execute("HSET", key, "n", bad)
        with pytest.raises(TypeError, match=r"is damaged|cannot be read back") as caught:
            await settle(store.load("r", "n"))
        assert isinstance(caught.value, stroma.CorruptCheckpoint)
        assert "this" not in sys.modules
        store.close()


Plain = type(
    "Plain",
    (BaseModel,),
    {"__annotations__": {"value": int}, "__module__": "stroma.cost", "__qualname__": "Plain"},
)
Other = type("Other", (BaseModel,), {"__annotations__": {"value": int}})


@pytest.fixture(autouse=True)
def _plain_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    # Under --import-mode=importlib this file need not be in sys.modules under its own name.
    import stroma.cost.budget

    monkeypatch.setattr(stroma.cost, "Plain", Plain, raising=False)


# ---------------------------------------------------------------------- runner


def test_run_config_defaults() -> None:
    """RunConfig() has a generated id and the published defaults, none of them shared with another config."""
    one, two = RunConfig(), RunConfig()
    assert one.run_id != two.run_id
    assert isinstance(one.run_id, str)
    assert one.budget == ExecutionBudget.unlimited()
    assert one.policy_map == default_policy_map()
    assert (one.node_policies, one.classifiers, one.context, one.node_timeouts) == ({}, [], {}, {})
    assert (one.resume_from, one.model_fallbacks) == (None, [])
    assert one.hooks == NodeHooks()
    for name in words("policy_map node_policies classifiers context node_timeouts model_fallbacks hooks"):
        assert getattr(one, name) is not getattr(two, name)


def test_quick() -> None:
    """quick() has an in-memory store and defaults; its keywords go to the store and to RunConfig.

    StromaRunner(registry, checkpoint_manager, config) has the three under their names.
    """
    three: Any = (ContractRegistry(), CheckpointManager(InMemoryStore()), RunConfig())
    names = ("registry", "checkpoint_manager", "config")
    for made in (StromaRunner(*three), StromaRunner(**dict(zip(names, three, strict=True)))):
        assert all(getattr(made, name) is part for name, part in zip(names, three, strict=True))
    plain = StromaRunner.quick()
    assert isinstance(plain.checkpoint_manager.store, AsyncInMemoryStore)
    assert isinstance(plain.registry, ContractRegistry)
    assert plain.config.budget == ExecutionBudget.unlimited()
    store, hooks = InMemoryStore(), NodeHooks()
    budget, policies = (
        ExecutionBudget(max_tokens_total=5),
        {FailureClass.AMBIGUOUS: FailurePolicy(max_retries=0)},
    )

    def classifier(exc: Exception, context: NodeContext) -> FailureClass | None:
        return None

    runner = StromaRunner.quick(
        store=store,
        budget=budget,
        policy_map=policies,
        classifiers=[classifier],
        hooks=hooks,
        run_id="r",
        node_timeouts={"n": 5},
        resume_from="n",
        model_fallbacks=[FallbackPolicy("a", "b")],
        node_policies={"n": policies},
    )
    config = runner.config
    assert runner.checkpoint_manager.store is store
    assert (config.budget, config.policy_map, config.hooks) == (budget, policies, hooks)
    assert config.classifiers == [classifier]
    assert (config.run_id, config.node_timeouts, config.resume_from) == ("r", {"n": 5}, "n")
    assert config.model_fallbacks == [FallbackPolicy("a", "b")]
    assert config.node_policies == {"n": policies}
    with pytest.raises(ValidationError):
        StromaRunner.quick(nonsense=1)
    with pytest.raises(TypeError):
        StromaRunner.quick(InMemoryStore())  # type: ignore[misc]


async def deaf(run_id: str, node_id: str, input_state: dict[str, Any]) -> None: ...


def silent(exc: Exception, context: NodeContext) -> FailureClass | None:
    return None


ONE_RETRY = {FailureClass.AMBIGUOUS: FailurePolicy(max_retries=1)}
BUILDERS: dict[str, tuple[Callable[[StromaRunner], StromaRunner], str, Any]] = {
    "with_budget": (lambda r: r.with_budget(tokens=5), "budget", ExecutionBudget(max_tokens_total=5)),
    "with_budget of all": (
        lambda r: r.with_budget(tokens=5, cost_usd=0.5, latency_ms=50),
        "budget",
        ExecutionBudget(max_tokens_total=5, max_cost_usd=0.5, max_latency_ms=50),
    ),
    "with_budget of nothing": (lambda r: r.with_budget(), "budget", ExecutionBudget.unlimited()),
    "with_classifiers": (lambda r: r.with_classifiers([silent]), "classifiers", [silent]),
    "with_hooks": (lambda r: r.with_hooks(NodeHooks(deaf)), "hooks", NodeHooks(deaf)),
    "with_context": (lambda r: r.with_context({"new": 1}), "context", {"new": 1}),
    "with_policy_map": (lambda r: r.with_policy_map(ONE_RETRY), "policy_map", ONE_RETRY),
    "with_node_policies": (
        lambda r: r.with_node_policies({"n": ONE_RETRY}),
        "node_policies",
        {"n": ONE_RETRY},
    ),
    "with_node_timeouts": (lambda r: r.with_node_timeouts({"n": 7}), "node_timeouts", {"n": 7}),
}


def full_config() -> RunConfig:
    return RunConfig(
        run_id="r",
        budget=ExecutionBudget(max_tokens_total=1, max_cost_usd=1.0, max_latency_ms=1),
        policy_map={FailureClass.TERMINAL: FailurePolicy(max_retries=0)},
        node_policies={"old": {}},
        hooks=NodeHooks(),
        classifiers=[lambda exc, context: None],
        context={"old": 1},
        node_timeouts={"old": 1},
        model_fallbacks=[FallbackPolicy("old", "older")],
    )


def test_type_checkers_know_every_field_of_a_config() -> None:
    """RunConfig and quick() name each field of RunConfig for type checkers and editors, and nothing else."""
    assert set(RunConfigFields.__annotations__) == set(RunConfig.model_fields)


@pytest.mark.parametrize("name", BUILDERS)
def test_builders(name: str) -> None:
    """A builder returns self, replaces its field whole, and leaves the other fields alone."""
    build, field, expected = BUILDERS[name]
    config = full_config()
    before = {f: getattr(config, f) for f in RunConfig.model_fields}
    runner = StromaRunner(ContractRegistry(), CheckpointManager(InMemoryStore()), config)
    assert build(runner) is runner
    assert getattr(runner.config, field) == expected
    for other in RunConfig.model_fields:
        if other != field:
            assert getattr(runner.config, other) == before[other], other


def test_with_model_fallback_appends() -> None:
    """with_model_fallback(model, to=, at_budget_pct=0.80) appends a rule."""
    runner = StromaRunner.quick()
    assert runner.with_model_fallback("a", to="b") is runner
    runner.with_model_fallback("b", to="c", at_budget_pct=0.9)
    assert runner.config.model_fallbacks == [FallbackPolicy("a", "b", 0.80), FallbackPolicy("b", "c", 0.9)]


@pytest.mark.parametrize("decorator", [stroma_node, stroma_step])
def test_stroma_node_marks(decorator: Any) -> None:
    """stroma_node(node_id, contract) marks the function with `_stroma_node_id` and `_stroma_contract`."""
    promised = contract("n")

    async def n(state: A) -> Any:
        return {"result": 1}

    marked = decorator("n", promised)(n)
    assert marked is n
    assert marked._stroma_node_id == "n"
    assert marked._stroma_contract is promised
    by_name = decorator(node_id="n", contract=promised)(n)
    assert by_name._stroma_contract is promised


async def test_runner_node_registers_and_marks() -> None:
    """runner.node(id, input=, output=) marks the function and registers its contract; it can be called."""
    runner = StromaRunner.quick()

    @runner.node("n", input=A, output=B)
    async def n(state: A) -> Any:
        return {"result": state.value}

    registered = runner.registry.get("n")
    assert (registered.node_id, registered.input_schema, registered.output_schema) == ("n", A, B)
    assert n._stroma_node_id == "n"  # type: ignore[attr-defined]
    assert n._stroma_contract == registered  # type: ignore[attr-defined]
    assert await n(A(value=3)) == {"result": 3}


# ---------------------------------------------------------------------- middleware


def context_of(**fields: Any) -> ReliabilityContext:
    config = RunConfig(**{"policy_map": NEVER, **fields})
    return ReliabilityContext.for_run(config, ContractRegistry(), CheckpointManager(InMemoryStore()))


def test_for_run() -> None:
    """for_run takes everything from the config, with a fresh tracker, trace and counts."""
    config, registry, manager = full_config(), ContractRegistry(), CheckpointManager(InMemoryStore())
    ctx = ReliabilityContext.for_run(config, registry, manager)
    assert ctx.run_id == "r"
    assert ctx.registry is registry
    assert ctx.checkpoint_manager is manager
    assert ctx.context is config.context
    assert (ctx.budget, ctx.policy_map) == (config.budget, config.policy_map)
    assert ctx.classifiers == config.classifiers
    assert (ctx.step_policies, ctx.step_timeouts) == (config.node_policies, config.node_timeouts)
    assert (ctx.model_fallbacks, ctx.hooks) == (config.model_fallbacks, config.hooks)
    assert isinstance(ctx.cost_tracker, CostTracker)
    assert isinstance(ctx.retry_budget, RetryBudget)
    assert isinstance(ctx.trace, ExecutionTrace)
    assert isinstance(ctx.run_logger, logging.LoggerAdapter)
    other = ReliabilityContext.for_run(config, registry, manager)
    for name in ("cost_tracker", "retry_budget", "trace"):
        assert getattr(ctx, name) is not getattr(other, name)


def test_context_from_its_published_fields() -> None:
    """A ReliabilityContext can be made from its published fields alone."""
    fields = {f.name: getattr(context_of(), f.name) for f in dataclasses.fields(ReliabilityContext)[:15]}
    ctx = ReliabilityContext(**fields)
    assert ctx.build_result(RunStatus.COMPLETED, None).run_id == fields["run_id"]


def test_run_logger_names_the_run(caplog: pytest.LogCaptureFixture) -> None:
    """Every record of run_logger is on the logger `stroma` and carries run_id."""
    context_of(run_id="r7").run_logger.warning("hello")
    (record,) = caplog.records
    assert (record.name, record.getMessage(), record.run_id) == ("stroma", "run 'r7': hello", "r7")


def test_build_result() -> None:
    """build_result(status, final_state) has the totals and the trace of the context."""
    ctx = context_of(run_id="r")
    ctx.cost_tracker.record(NodeUsage("n", 10, 0.5, 3))
    instance = event()
    ctx.trace.append(instance)
    result = ctx.build_result(RunStatus.PARTIAL, A(value=1))
    assert isinstance(result, ExecutionResult)
    assert (result.run_id, result.status, result.final_state) == ("r", RunStatus.PARTIAL, A(value=1))
    assert (result.total_tokens, result.total_cost_usd) == (10, 0.5)
    assert list(result.trace) == [instance]


def test_hook_callables_may_be_given_by_position() -> None:
    """NodeHooks(start, success, failure) takes the three in their published order."""

    async def start(*_: Any) -> None: ...
    async def success(*_: Any) -> None: ...
    async def failure(*_: Any) -> None: ...

    hooks = NodeHooks(start, success, failure)
    assert (hooks.on_node_start, hooks.on_node_success, hooks.on_node_failure) == (start, success, failure)
