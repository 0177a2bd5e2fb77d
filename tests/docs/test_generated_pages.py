"""Generated docs are up to date, and errors say on their page and in their text how to go on."""

from __future__ import annotations

import ast
import asyncio
import importlib
import importlib.util
import inspect
import pickle
import pkgutil
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr
from tests.kit import Note, SimpleStore, words
from tests.project.test_language import BANNED_PROSE

import stroma
from stroma import (
    AsyncInMemoryStore,
    Breaker,
    BudgetExceeded,
    CheckFailed,
    CheckpointNotFound,
    CircuitOpen,
    ContractRegistry,
    ContractViolation,
    CorruptCheckpoint,
    CostTracker,
    ExecutionBudget,
    Fenced,
    HookError,
    InMemoryStore,
    Limit,
    LimitError,
    NodeContract,
    NodeHooks,
    NodeUsage,
    NotSerialisable,
    PipelineChanged,
    RequestRefused,
    RunBusy,
    RunExists,
    RunFailed,
    SharedBudget,
    SharedBudgetExceeded,
    SQLiteStore,
    StoreError,
    StromaRunner,
    UsageError,
    WaitedTooLong,
    map_over,
    open_store,
    parallel,
    stroma_node,
)
from stroma.adapters import Guard, RunCancelled, UnknownNode
from stroma.failures.failure import _MEANINGS
from stroma.hooks.dispatch import HookNotAsync, HookTimeout

ROOT = Path(__file__).parents[2]
ANEW = "write it anew with: ./dev run python docs/generate.py"


@pytest.fixture(scope="module")
def generate() -> Any:
    spec = importlib.util.spec_from_file_location("stroma_docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date(generate: Any) -> None:
    """What docs/generate.py writes is what is there, and nothing else is under docs/reference."""
    # In a process of its own: Python 3.11 parses wrongly while another thread does.
    command = [sys.executable, "docs/generate.py", "--check"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, f"{checked.stdout}{checked.stderr}: {ANEW}"
    findings = {
        path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs" / "reference").iterdir()
    }
    assert findings <= set(generate.PAGES)


def test_every_parameter_has_a_type_a_default_and_a_description() -> None:
    """The reference lists each parameter for users, with its type, default, unit and meaning."""
    spec = importlib.util.spec_from_file_location("stroma_docs_reference", ROOT / "docs" / "reference.py")
    reference = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = reference
    spec.loader.exec_module(reference)
    listed = set()
    for topic in reference.TOPICS:
        text = (ROOT / "docs" / "reference" / f"{topic}.md").read_text("utf-8")
        for name, rows in re.findall(
            r"^### \w+ of `([\w.]+)`\n\n\|.*\n\| ---.*\n((?:\|.*\n)+)", text, re.MULTILINE
        ):
            listed.add(name)
            for row in rows.splitlines():
                parameter, kind, default, unit, meaning = row.strip("|").split("|")
                assert "<code>" in kind, (name, row)
                assert len(meaning.strip()) > 10, (name, row)
                assert default.strip() or parameter.strip() in ("`nodes`", "`options`", "`limits`"), (
                    name,
                    row,
                )
                in_name = re.search(r"_(ms|seconds|usd|bytes)`", parameter)
                assert unit.strip() or in_name is None, (name, row)
    none = {"InMemoryStore", "AsyncInMemoryStore"}  # They take no argument.
    assert listed == (reference.PARAMETERS - none) | {"StromaRunner.quick"}
    assert set(words("RunConfig FailurePolicy NodeContract NodeHooks ExecutionResult SQLiteStore")) <= listed
    running = (ROOT / "docs" / "reference" / "running.md").read_text("utf-8")
    for field in stroma.RunConfig.model_fields:
        assert running.count(f"`{field}`") > 1, field


def is_error(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, BaseException)


def public_errors() -> dict[str, type[BaseException]]:
    """Return the exception classes that users meet: in a public package, or described as such."""
    findings: dict[str, type[BaseException]] = {}
    for info in pkgutil.walk_packages(stroma.__path__, "stroma."):
        if any(part.startswith("_") for part in info.name.split(".")):
            continue
        try:
            module = importlib.import_module(info.name)
        except (
            ImportError
        ):  # The adapter of a framework, which is not in the lock; it raises the errors of others.
            assert info.name.startswith("stroma.adapters."), info.name
            continue
        for value in vars(module).values():
            if is_error(value) and value.__module__ == info.name and "Where: " in (value.__doc__ or ""):
                findings[value.__name__] = value
    for package in ("stroma", "stroma.checkpoint", "stroma.telemetry", "stroma.temporal", "stroma.testing"):
        public = importlib.import_module(package)
        values = (getattr(public, name) for name in public.__all__)
        findings |= {value.__name__: value for value in values if is_error(value)}
    return findings


def test_the_page_about_defaults_has_every_parameter(generate: Any) -> None:
    """Each parameter of RunConfig, StromaRunner.quick and the stores has a line on what its default loses."""
    page = generate.own_module("docs.defaults")
    stores = {
        name for name in stroma.__all__ if name.endswith("Store") and not name.endswith("CheckpointStore")
    }
    assert set(page.LOSSES) == {"RunConfig", "StromaRunner.quick", *stores}
    assert {name: set(losses) for name, losses in page.LOSSES.items()} == {
        name: page.names_of(name) for name in page.LOSSES
    }


def test_every_public_error_is_on_the_page(generate: Any) -> None:
    """docs/errors.md, and its docstring, has base, place, cause and fix of every public exception class."""
    text = (ROOT / "docs" / "errors.md").read_text("utf-8")
    result = public_errors()
    assert {"StoreError", "ContractViolation", "BudgetExceeded", "HookError", "HookTimeout"} <= set(result)
    assert set(result) == {error.name for error in generate.error_classes()}
    for name, cls in result.items():
        described = inspect.getdoc(cls) or ""
        assert [part for part in ("Where: ", "Cause: ", "Fix: ") if part not in described] == [], name
        if cls.__module__.startswith("stroma.cli"):
            continue  # Its messages are listed under the command line.
        section = re.search(rf"^## {name}\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
        assert section is not None, f"{name} is not in docs/errors.md; {ANEW}"
        home = "stroma" if name in stroma.__all__ else generate.public(cls.__module__)
        assert f"`{home}.{name}`" in section[1]
        for part in generate.PARTS:
            # A whole sentence: nothing is cut off.
            assert re.search(rf"^- \*\*{part}\.\*\* \S.{{20,}}\.$", section[1], re.MULTILINE), (name, part)
        row = re.search(rf"^\| \[{name}\]\(#{name.lower()}\) \| (.*?) \| ", text, re.MULTILINE)
        assert row[1] == ", ".join(f"`{base.__name__}`" for base in cls.__bases__)


def test_every_reason_has_its_meaning(generate: Any) -> None:
    """Each word that a failure's reason may be is explained."""
    known = set()
    for name in words("""
        failures/provider_verdicts failures/failure engine/attempt engine/commit engine/diagnosis engine/loop
        engine/metering engine/outcome
    """):
        tree = ast.parse((ROOT / "src" / "stroma" / f"{name}.py").read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ProviderVerdict":
                known.add(ast.literal_eval(node.args[1]))
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", "") == "Failure"
                and len(node.args) > 5
            ):
                known |= {node.args[5].value} if isinstance(node.args[5], ast.Constant) else set()
    known |= {reason for _, (_, reason) in _MEANINGS}
    assert known - {None} | {"bug"} == set(generate.REASONS)


#: Parts of texts that name no way out, each with what stands against it.
WITHOUT_MEND = {
    "cannot store the data": "what the database says of the value",
    "the store could not record node": "the store's own error says it",
    "{path}: {error}": "what SQLite says that nobody has met yet",
    "node {node_id}: {error}": "what is wrong with a response, said for a node",
    "hook calls raised; the first": "the hook's own exception says it",
}


def test_messages_name_the_fix_in_the_words_of_the_pages(generate: Any) -> None:
    """Every text that an error is raised with is on the page about errors and has no banned word.

    That of an error of our own says what must be, or ends with the fix, but for those listed.
    """
    page = (ROOT / "docs" / "errors.md").read_text("utf-8")
    messages, own = generate.messages(), generate.examples()
    assert len(messages) > 300
    for message in messages:
        elsewhere = message.error in generate.BUILT_IN and re.match(r"stroma\.(cli|demo)", message.module)
        if message.error not in own and not elsewhere:
            assert message.text in page, f"{message}; {ANEW}"
    wrong = [
        f"{message.module}: {match[0]!r} in {message.text!r}: write {better}"
        for message in messages
        for pattern, better in BANNED_PROSE.items()
        if not pattern.startswith("^") and (match := re.search(pattern, message.text))
    ]
    assert not wrong, "\n".join(wrong)
    ours = {e.name for e in generate.error_classes()} - {"Problem", *own}
    texts = {message.text for message in messages if message.error in ours}
    listed = {text for text in texts if any(part in text for part in WITHOUT_MEND)}
    mended = {text for text in texts if re.search(r"; (or )?[a-z`{]+\b| must (be|return) ", text)}
    assert texts - mended - listed == set(), "name the fix after a semicolon"
    assert [part for part in WITHOUT_MEND if not any(part in text for text in texts)] == [], "no longer there"


class Secret(BaseModel):
    text: str = ""
    key: SecretStr = SecretStr("")


class Items(BaseModel):
    items: list[Note] = []


def a_node(name: str, returned: Any, schema: type[BaseModel] = Note) -> Any:
    @stroma_node(name, input=Note, output=schema)
    async def func(state: Note) -> Any:
        return returned

    return func


async def run(nodes: list[Any], state: BaseModel | None = None, **config: Any) -> Any:
    options = {key: config.pop(key) for key in ("resume", "resume_from") if key in config}
    runner = StromaRunner.quick(**config)
    result = await runner.run(nodes, state if state is not None else Note(), run_id="run-7", **options)
    result.raise_for_status()
    return result


Provoke = Callable[[Path], Awaitable[Any]]
#: What provokes an error, its class, what it must name (the node, the run), and the fix.
MET: list[tuple[Provoke, type[Exception], tuple[str, ...], str]] = []


def met(kind: type[Exception], *names: str, fix: str = "") -> Callable[[Provoke], Provoke]:
    """Return a decorator that says which error a function provokes."""

    def add_error(provoke: Provoke) -> Provoke:
        MET.append((provoke, kind, names, fix))
        return provoke

    return add_error


@met(ContractViolation, "'shorten'", "output", "text: Input should be a valid string")
async def violation(path: Path) -> Any:
    await run([a_node("shorten", {"text": 5})])


@met(BudgetExceeded, "'shorten'", "10 tokens", "11 tokens", fix="raise max_tokens_total")
async def budget(path: Path) -> Any:
    await run([a_node("shorten", ({}, 11))], budget=ExecutionBudget(max_tokens_total=10))


@met(UsageError, "'shorten'", "-1", fix="report whole numbers of tokens")
async def usage(path: Path) -> Any:
    await run([a_node("shorten", ({}, -1))])


@met(UsageError, "'shorten'", "'no-such-model'", fix="add it to KNOWN_MODELS")
async def unpriced(path: Path) -> Any:
    await run([a_node("shorten", ({}, 1, 1, "no-such-model"))], unknown_model="error")


@met(NotSerialisable, "Secret.key")
async def unserialisable(path: Path) -> Any:
    await run([a_node("shorten", {"key": "x"}, Secret)], store=SQLiteStore(path / "x.db"))


@met(CheckpointNotFound, "'run-7'", "'read'", "'shorten'", fix="run the pipeline from its start")
async def not_found(path: Path) -> Any:
    await run([a_node("read", {}), a_node("shorten", {})], resume_from="shorten")


@met(
    PipelineChanged,
    "'run-7'",
    "'shorten'",
    "'cut'",
    "position 1",
    fix="restore the order of nodes, or start a new run",
)
async def changed(path: Path) -> Any:
    store = AsyncInMemoryStore()
    await run([a_node("read", {}), a_node("shorten", {})], store=store)
    await run([a_node("read", {}), a_node("cut", {})], store=store, resume=True)


@met(PipelineChanged, "'run-7'", fix="pass the same input, or use another run id")
async def other_input(path: Path) -> Any:
    store = SQLiteStore(path / "x.db")
    await run([a_node("read", {})], store=store)
    await run([a_node("read", {})], Note(text="other"), store=store, resume=True)


@met(StoreError, "'run-7'", "Simple", fix="use resume_from=, or a journal store such as SQLiteStore")
async def no_journal(path: Path) -> Any:
    await run([a_node("read", {})], store=SimpleStore(), resume=True)


@met(StoreError, "'run-7'", "'read'", "the disk is full")
async def refused(path: Path) -> Any:
    class Full(SimpleStore):
        def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
            raise OSError("the disk is full")

    await run([a_node("read", {})], store=Full())


@met(StoreError, "x.db", fix="use another path, or move that file away")
async def no_database(path: Path) -> Any:
    (path / "x.db").write_text("no database")
    await run([a_node("read", {})], store=SQLiteStore(path / "x.db"))


TAKEN: dict[str, Any] = {"if_running": "take_over", "if_exists": "restart"}


@met(Fenced, "'run-7'", fix="see the result of the other one")
async def fenced(path: Path) -> Any:
    async def again(run_id: str, node_id: str, state: dict[str, Any]) -> None:
        await run([a_node("read", {})], store=SQLiteStore(path / "x.db"), **TAKEN)

    hooks = NodeHooks(on_node_start=again)
    await run([a_node("read", {})], store=SQLiteStore(path / "x.db"), hooks=hooks)


@met(Fenced, "'run-7'", fix="see the result of the other one")
async def fenced_in_memory(path: Path) -> Any:
    store = AsyncInMemoryStore()

    async def again(run_id: str, node_id: str, state: dict[str, Any]) -> None:
        await run([a_node("read", {})], store=store, **TAKEN)

    await run([a_node("read", {})], store=store, hooks=NodeHooks(on_node_start=again))


@met(RunBusy, "'run-7'", "process", fix='if_running="attach"')
async def busy(path: Path) -> Any:
    async def again(run_id: str, node_id: str, state: dict[str, Any]) -> None:
        await run([a_node("read", {})], store=SQLiteStore(path / "x.db"))

    hooks = NodeHooks(on_node_start=again)
    result = await run([a_node("read", {})], store=SQLiteStore(path / "x.db"), hooks=hooks)
    raise result.hook_errors[0].exception


@met(RunExists, "'run-7'", "COMPLETED", fix="use another run id")
async def exists(path: Path) -> Any:
    store = SQLiteStore(path / "x.db")
    await run([a_node("read", {})], store=store)
    await run([a_node("read", {})], store=store, if_exists="error")


@met(RunFailed, "'read'", "text: Input should be a valid string")
async def failed_elsewhere(path: Path) -> Any:
    store = SQLiteStore(path / "x.db")
    other: list[asyncio.Task[Any]] = []

    @stroma_node("read", input=Note, output=Note)
    async def read(state: Note) -> Any:
        if not other:
            other.append(asyncio.create_task(run([read], store=store, if_running="attach")))
            await asyncio.sleep(0.02)
        return {"text": 5}

    with pytest.raises(ContractViolation):
        await run([read], store=store)
    await other[0]


@met(HookError, "on_node_success", "'read'", "no dashboard")
async def hook_raises(path: Path) -> Any:
    async def broken(*args: Any) -> None:
        raise LookupError("no dashboard")

    await run([a_node("read", {})], hooks=NodeHooks(on_node_success=broken), hook_errors="raise")


@met(HookNotAsync, "on_node_start", "'read'", fix="define it with async def")
async def hook_not_async(path: Path) -> Any:
    await run([a_node("read", {})], hooks=NodeHooks(on_node_start=lambda *args: None))  # type: ignore[arg-type,return-value]


@met(HookTimeout, "5 ms", fix="hook_timeout_ms")
async def hook_slow(path: Path) -> Any:
    async def slow(*args: Any) -> None:
        await asyncio.sleep(5)

    result = await run([a_node("read", {})], hooks=NodeHooks(on_node_start=slow), hook_timeout_ms=5)
    raise result.hook_errors[0].exception


@met(TimeoutError, "'slow'", "5 ms", fix="raise node_timeouts['slow']")
async def timeout(path: Path) -> Any:
    @stroma_node("slow", input=Note, output=Note)
    async def slow(state: Note) -> dict[str, Any]:
        await asyncio.sleep(5)
        return {}

    await run([slow], node_timeouts={"slow": 5}, policy_map={c: {"max_retries": 0} for c in ("RECOVERABLE",)})


@met(TypeError, "plain", fix="decorate it with @stroma_node or @runner.node")
async def no_node(path: Path) -> Any:
    async def plain(state: Note) -> dict[str, Any]:
        return {}

    await run([plain])


@met(ValueError, "'raed'", fix="its nodes are 'read'")
async def unknown_target(path: Path) -> Any:
    await run([a_node("read", {})], resume_from="raed")


@met(TypeError, "dict", fix="must be a pydantic model")
async def no_state(path: Path) -> Any:
    await run([a_node("read", {})], {"text": ""})  # type: ignore[arg-type]


@met(ValueError, "parallel()", fix="needs at least one node")
async def no_children(path: Path) -> Any:
    parallel()


@met(TypeError, "'text'", fix="fields: text")
async def no_list(path: Path) -> Any:
    await run([map_over("text", a_node("read", {}), into="read")])


@met(ValueError, "node id", fix="must not be empty")
async def empty_id(path: Path) -> Any:
    NodeContract(node_id="", input_schema=Note, output_schema=Note)


@met(KeyError, "'read'", fix="register one, or decorate the node")
async def no_contract(path: Path) -> Any:
    ContractRegistry().get("read")


@met(CheckFailed, "'read'", "'needs'", "number (int)", fix="add it to the output of 'read'")
async def cannot_work(path: Path) -> Any:
    needs = stroma_node("needs", input=Strict, output=Note)(a_function)
    await run([a_node("read", {}), needs], check=True)


async def a_function(state: Any) -> Any: ...


@met(BudgetExceeded, "'read'", fix="raise max_tokens_total")
async def over_by_hand(path: Path) -> Any:
    tracker = CostTracker()
    tracker.record(NodeUsage("read", 11, 0.0, 0))
    tracker.check_budget(ExecutionBudget(max_tokens_total=10), "read")


@met(TypeError, "schema", fix="must be a BaseModel type")
async def other_class(path: Path) -> Any:
    store = InMemoryStore()
    store.save("run-7", "read", Items())
    store.load_typed("run-7", "read", int)  # type: ignore[type-var]


@met(ValueError, "mongodb://", fix="use ")
async def no_store(path: Path) -> Any:
    open_store("mongodb://somewhere")


@met(
    SharedBudgetExceeded,
    "'team-a'",
    "'shorten'",
    "10 tokens",
    "8 spent",
    fix="raise max_tokens, then resume the run",
)
async def shared_budget(path: Path) -> Any:
    team = SharedBudget("team-a", max_tokens=10, store=AsyncInMemoryStore(), reserve_tokens=8)
    await run([a_node("read", ({}, 8)), a_node("shorten", {})], shared_budgets=team)


@met(LimitError, "'read'", "8 tokens", "tokens_per_minute=5", "limit 'docs-tokens'", fix="raise the limit")
async def never_met(path: Path) -> Any:
    name = "docs-tokens"
    options = {"limits": {name: Limit(tokens_per_minute=5)}, "node_limits": {"read": name}}
    await run([a_node("read", ({}, 8)), a_node("read", ({}, 8))], **options)


@met(WaitedTooLong, "'read'", "limit 'docs-requests'", fix="raise the limit, or max_wait_seconds")
async def waited_too_long(path: Path) -> Any:
    name = "docs-requests"
    limit = Limit(requests_per_minute=1, max_wait_seconds=0.01)
    await run([a_node("read", {}), a_node("read", {})], limits={name: limit}, node_limits={"read": name})


@met(CircuitOpen, "limit 'read'", fix="raise max_wait_seconds of the breaker")
async def circuit_open(path: Path) -> Any:
    breaker = Breaker(min_calls=1, max_wait_seconds=0)
    breaker.leave("limit 'read'", False, probe=False)
    await run([a_node("read", {})], breaker=breaker, limits={"read": Limit(concurrent=1)})


@met(UnknownNode, "'serach'", "tool", fix="known: 'search'")
async def no_such_tool(path: Path) -> Any:
    Guard().contracts({"serach": (Note, Note)}, ["search"], "tool")


@met(RunCancelled, "'r1'", "'read'", fix="call it in another run")
async def ended_from_elsewhere(path: Path) -> Any:
    guard = Guard()

    async def read() -> None:
        return None

    async with guard.run(run_id="r1") as run:
        run.cancel()
        await guard.wrap("read", read)()


@met(RequestRefused, "'run-7'", "COMPLETED", fix="send it to another run")
async def message_to_an_ended_run(path: Path) -> Any:
    store = AsyncInMemoryStore()
    await run([a_node("read", {})], store=store, run_id="run-7")
    await StromaRunner.quick(store=store).send("run-7", "hello")


@met(ValueError, "'read'", "got 0", fix="must be a positive number of milliseconds")
async def zero_timeout(path: Path) -> Any:
    StromaRunner.quick(node_timeouts={"read": 0})


@pytest.mark.parametrize(("provoke", "kind", "names", "fix"), MET, ids=lambda v: getattr(v, "__name__", ""))
async def test_what_an_error_says(
    provoke: Provoke, kind: type[Exception], names: tuple[str, ...], fix: str, tmp_path: Path
) -> None:
    """An error that a user meets names the node and the run it is about, and the way out."""
    with pytest.raises(kind) as caught:
        await provoke(tmp_path)
    text = str(caught.value)
    assert [name for name in names if name not in text] == [], text
    assert fix in text


def test_every_public_error_is_met() -> None:
    """Each public exception class is provoked above except those that no store of ours raises."""
    met = {kind.__name__ for _, kind, _, _ in MET}
    # Raised by nodes and in flows, never out of run(); by nodes with a place; by Redis alone; made of what
    # another machine says; by tests that ask for it.
    unmet = words("""
        CorruptCheckpoint PlaceError WorkerLost Problem Suspend CheckpointLost Crashed StepFailed Transient
    """)
    assert set(public_errors()) - met == set(unmet)


@pytest.mark.parametrize("store", ["memory", "sqlite"])
async def test_a_corrupt_checkpoint_names_node_and_run(store: str, tmp_path: Path) -> None:
    """A saved state that is not of the schema it is asked for names its node and run."""
    entry: Any = InMemoryStore() if store == "memory" else SQLiteStore(tmp_path / "x.db")
    await settled(entry.save("run-7", "read", Note(text="x")))
    with pytest.raises(CorruptCheckpoint) as caught:
        await settled(entry.load_typed("run-7", "read", Strict))
    assert "'read'" in str(caught.value)
    assert "'run-7'" in str(caught.value)


class Strict(BaseModel):
    number: int


async def settled(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


@pytest.mark.parametrize(
    "error",
    [
        ContractViolation("a", "output", {}, []),
        BudgetExceeded("tokens", 1, 2, "a"),
        Fenced("x"),
        CheckFailed([]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling(error: Exception) -> None:
    """Errors cross process boundaries with their text."""
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
