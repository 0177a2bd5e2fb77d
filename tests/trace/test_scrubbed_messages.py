"""Messages of failures and exceptions wherever they are shown: no secrets or control characters."""

import base64
import io
import logging
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from pydantic import BaseModel, SecretStr, field_validator, model_validator
from tests.kit import NEVER, Rot, computing, context_of, passing, returning, same, undone_command

from stroma import (
    AsyncInMemoryStore,
    Flow,
    NodeHooks,
    RunStatus,
    SQLiteStore,
    StromaRunner,
    Suspend,
    current_node_or_none,
    execute_step,
    map_over,
    parallel,
    stroma_flow,
)
from stroma._utils.hiding import without
from stroma.cli import main as stroma_command
from stroma.telemetry import log_hooks
from stroma.telemetry.content import DeniedNames
from stroma.trace.redaction import forms_to_hide

SECRET = "sk-live/abc+def 123456"
FORGED = "no\r\n2026-01-01 ERROR forged\x1b[2J\u202egnp.exe"


class Call(BaseModel):
    user: str = "ada"
    token: SecretStr = SecretStr(SECRET)


class Log:
    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.handler = logging.StreamHandler(self.stream)
        self.handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))

    @property
    def text(self) -> str:
        return self.stream.getvalue()


@pytest.fixture
def log() -> Iterator[Log]:
    """All that is logged, as a file would have it."""
    instance = Log()
    logger = logging.getLogger("stroma")
    logger.addHandler(instance.handler)
    logger.setLevel(logging.DEBUG)
    yield instance
    logger.removeHandler(instance.handler)
    logger.setLevel(logging.NOTSET)


def failing(runner: StromaRunner, raised: Any) -> list[Any]:
    @runner.node("call", input=Call, output=Call)
    async def call(state: Call) -> Any:
        raise raised(state) if callable(raised) else raised

    return [call]


def forms(secret: str) -> list[str]:
    """A secret as messages quote it."""
    return [secret, quote(secret, safe=""), secret.encode().hex(), base64.b64encode(secret.encode()).decode()]


@pytest.mark.parametrize("form", range(4))
@pytest.mark.parametrize("durable", [False, True])
async def test_secrets_are_masked_everywhere(tmp_path: Path, log: Log, form: int, durable: bool) -> None:
    """The text of a SecretStr, also encoded, is in no log line, trace, page, store or exporter's field."""
    store: Any = SQLiteStore(tmp_path / "runs.db", codec=Rot()) if durable else AsyncInMemoryStore()
    runner = StromaRunner.quick(store=store, policy_map=NEVER, hooks=log_hooks(content="redacted"))
    text = lambda state: ValueError(f"GET /v1?key={forms(state.token.get_secret_value())[form]} failed")  # noqa: E731
    result = await runner.run(failing(runner, text), Call(), run_id="r")
    assert isinstance(result.failure.exception, ValueError)
    assert "key=**********" in result.failure.message
    for report in (
        log.text,
        result.trace.to_json(),
        result.to_html(),
        result.failure.message,
        repr(result.trace.failures()),
        repr(store.attempts("r")[0].message),
        repr(store.get_run("r")),
    ):
        for secret in forms(SECRET):
            assert secret not in report
    if durable:
        await store.aclose()


async def test_secrets_of_the_context_are_masked() -> None:
    """A secret in the run's context is masked like one of a state."""
    runner = StromaRunner.quick(policy_map=NEVER, context={"client": {"key": SecretStr("context-secret")}})
    result = await runner.run(failing(runner, ValueError("401 for context-secret")), Call())
    assert result.failure.message == "401 for **********"


async def test_a_secret_in_a_broken_contract_is_masked() -> None:
    """What a validator of the user's says of a rejected output tells no secret of plain text."""

    class Login(BaseModel):
        token: SecretStr

        @field_validator("token", mode="before")
        @classmethod
        def _known(cls, value: Any) -> Any:
            raise ValueError(f"{value} is no known token")

    runner = StromaRunner.quick(policy_map=NEVER)
    login = runner.node("login", input=Call, output=Login)(returning({"token": "plain-secret-text"}))
    result = await runner.run([login], Call())
    assert "is no known token" in result.failure.message
    assert "plain-secret-text" not in result.failure.message


async def test_secrets_of_a_question_are_masked() -> None:
    """The reason of a Suspend is masked, too."""
    runner = StromaRunner.quick(policy_map=NEVER)
    raised = lambda state: Suspend(f"may {state.token.get_secret_value()} be used?")  # noqa: E731
    result = await runner.run(failing(runner, raised), Call())
    assert result.suspended == ["may ********** be used?"]


async def test_a_raising_hook_tells_no_secret(log: Log) -> None:
    """What a hook raises is logged with its traceback, in one line for each message and without secrets."""

    async def on_node_failure(_run_id: str, _node_id: str, exc: Exception, _class: Any) -> None:
        assert current_node_or_none() is not None
        try:
            raise KeyError(SECRET)
        except KeyError as cause:
            raise RuntimeError(f"cannot report {SECRET}: {FORGED}") from cause

    runner = StromaRunner.quick(policy_map=NEVER, hooks=NodeHooks(on_node_failure=on_node_failure))
    result = await runner.run(failing(runner, ValueError("no")), Call())
    assert SECRET not in log.text
    assert "RuntimeError: cannot report **********: no\\r\\n2026-01-01 ERROR forged\\u001b[2J" in log.text
    assert "in on_node_failure" in log.text
    assert [type(one.exception) for one in result.hook_errors] == [RuntimeError]
    assert SECRET in str(result.hook_errors[0].exception)


class NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def chained(first: BaseException, count: int) -> BaseException:
    for _ in range(count):
        outer = NoText()
        outer.__cause__ = first
        first = outer
    return first


async def test_a_logged_traceback_tells_no_secret(log: Log) -> None:
    """The traceback of a hook is logged without the secrets of the state, wherever the exception has them."""

    async def on_node_success(*_: Any) -> None:
        raise chained(ValueError(SECRET), 12)

    runner = StromaRunner.quick(hooks=NodeHooks(on_node_success=on_node_success))

    call = runner.node("call", input=Call, output=Call)(passing())
    await runner.run([call], Call())
    assert "in on_node_success" in log.text
    assert SECRET not in log.text


class Folder(BaseModel):
    child: "Folder | None" = None
    password: SecretStr = SecretStr("")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if "bad" in data:
            raise ValueError(f"cannot use {data}")
        return data


@pytest.mark.parametrize("depth", [5, 20, 99, 150])
async def test_a_secret_that_a_schema_declares_is_masked_at_any_depth(log: Log, depth: int) -> None:
    """A declared secret that a validator quotes is in no message, log or page; nor is what is too deep."""
    value: dict[str, Any] = {"password": SECRET, "bad": 1}
    for _ in range(depth):
        value = {"child": value}
    runner = StromaRunner.quick(policy_map=NEVER)
    call = runner.node("call", input=Call, output=Folder)(computing(lambda _: value))
    result = await runner.run([call], Call(token=SecretStr("")))
    assert "**********" in result.failure.message
    for text in (result.failure.message, log.text, result.to_html(), str(result.failure.as_prompt())):
        assert SECRET not in text


class Endless(Mapping[Any, Any]):
    def __getitem__(self, key: Any) -> Any:
        return 1

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        n = 0
        while True:
            yield (n := n + 1)


async def test_an_endless_mapping_does_not_stop_the_event_loop() -> None:
    """An output with a mapping that never ends is refused, and its trace shown, in bounded time."""

    class Login(BaseModel):
        password: SecretStr
        n: int

    runner = StromaRunner.quick(policy_map=NEVER)

    @runner.node("call", input=Call, output=Login)
    async def call(state: Call) -> Any:
        return {"password": SECRET, "n": Endless()}

    result = await runner.run([call], Call())
    assert SECRET not in str(result.failure.as_prompt()) + result.to_html()


async def test_a_message_is_one_line_of_a_log(log: Log) -> None:
    """Line breaks, terminal escapes and marks of direction in a message are escaped; its type comes first."""
    runner = StromaRunner.quick(policy_map=NEVER)
    await runner.run(failing(runner, ConnectionResetError(FORGED)), Call())
    line = next(line for line in log.text.split("\n") if "failed at attempt" in line)
    assert line.endswith("ConnectionResetError: no\\r\\n2026-01-01 ERROR forged\\u001b[2J\\u202egnp.exe")
    assert not any(line.startswith("2026") for line in log.text.splitlines())


async def test_the_line_of_an_item_that_is_left_out_is_one_line(log: Log) -> None:
    """What the log says of an item of a map collected as failed has its type first, and is one line."""

    runner = StromaRunner.quick(policy_map=NEVER)
    (call,) = failing(runner, ConnectionResetError(FORGED))
    nodes = [map_over("calls", call, into="done", on_item_failure="collect")]
    result = await runner.run(nodes, Calls(calls=[Call()]))
    assert result.failed_items == 1
    line = next(line for line in log.text.split("\n") if "failed and is skipped" in line)
    assert line.endswith("ConnectionResetError: no\\r\\n2026-01-01 ERROR forged\\u001b[2J\\u202egnp.exe")


async def test_no_field_of_a_log_line_can_be_forged(log: Log) -> None:
    """A value with blanks, quotes or an equals sign is quoted where a line has fields."""
    runner = StromaRunner.quick(policy_map=NEVER, hooks=log_hooks(content="redacted"), pipeline="a b")
    await runner.run(failing(runner, ValueError('x" outcome=success run_id=other\n')), Call(), run_id="r 1=2")
    line = next(line for line in log.text.splitlines() if "node failure" in line)
    assert 'run_id="r 1=2" pipeline="a b" ' in line
    assert 'error_message="x\\" outcome=success run_id=other\\\\n"' in line


async def test_pages_show_the_type_and_no_marks_of_direction() -> None:
    """The HTML of a result names the exception's type, and shows marks that reverse a text as escapes."""
    runner = StromaRunner.quick(policy_map=NEVER)
    result = await runner.run(failing(runner, KeyError("ledger")), Call(user="\u202eadmin"))
    page = result.to_html()
    assert "KeyError: &#x27;ledger&#x27;" in page
    assert "\u202e" not in page
    assert "\\u202eadmin" in page


def test_the_command_line_names_the_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`stroma run` says `Type: message` in its progress and at its end, and tells no secret."""
    (tmp_path / "flow.py").write_text(
        "from pydantic import BaseModel, SecretStr\n"
        "from stroma import NodeContract, Pipeline, stroma_node\n"
        "class S(BaseModel):\n    token: SecretStr = SecretStr('sk-live-abcdef')\n"
        "async def work(state):\n    raise KeyError(state.token.get_secret_value())\n"
        "contract = NodeContract(node_id='work', input_schema=S, output_schema=S)\n"
        "pipeline = Pipeline('p', [stroma_node('work', contract)(work)])\n"
    )
    with undone_command():
        stroma_command(["run", f"{tmp_path / 'flow.py'}:pipeline", "--db", "memory://"])
    printed = capsys.readouterr()
    assert "KeyError: '**********'" in printed.err
    assert "sk-live-abcdef" not in printed.err + printed.out


def _seconds(call: Any) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a" * 300_000, ["a" * 12 + "b" * 300_000]),
        ("a" * 300_000, ["a" * 300_000]),
        ("x" * 20_000, [f"v{i:06d}" for i in range(50_000)]),
        ("customer-id-" * 2_000, [f"customer-id-{i:06d}" for i in range(10_000)]),
    ],
)
def test_hiding_takes_bounded_time(text: str, values: list[str]) -> None:
    """Values and texts made to be slow cost at most a moment; what could not be searched is hidden whole."""
    assert _seconds(lambda: without(text, values)) < 5  # Minutes, before.
    assert "customer-id-000" not in without(text, values)


def test_many_hidden_values_hide_the_message() -> None:
    """Where more values are hidden than can be looked for, the whole message is."""
    values = [f"v{i:06d}" for i in range(20_000)]
    hidden = forms_to_hide(values)
    assert len(hidden) == 1
    assert without("v000001 failed", hidden) == "[redacted]"
    few = forms_to_hide(values[:100])
    assert without("v000001 failed, v999999 did not", few) == "[redacted] failed, v999999 did not"


def test_a_long_key_takes_bounded_time() -> None:
    """A key of a model's answer costs time linear in its length; denied names are still found."""
    denied = DeniedNames(("api_key", "password", "*private_key*"))
    assert _seconds(lambda: "_" * 60_000 in denied) < 5
    assert _seconds(lambda: "x_" * 30_000 in denied) < 5
    assert _seconds(lambda: "1_" * 30_000 in denied) < 5
    for name in ("openai_api_key", "dbPassword", "API-KEY", "pass_word", "x" * 60_000 + "_password"):
        assert name in denied, name
    for name in ("keyboard", "passwords_sent", "api", "monkey"):
        assert name not in denied, name


class Calls(BaseModel):
    calls: list[Call] = []
    done: list[Call] = []


def quick(store: Any = None, **config: Any) -> StromaRunner:
    return StromaRunner.quick(store=store or AsyncInMemoryStore(), policy_map=NEVER, **config)


def identity(runner: StromaRunner, name: str) -> Any:
    return runner.node(name, input=Call, output=Call)(passing())


async def test_the_cause_of_an_unknown_effect_is_masked() -> None:
    """The error of an effect's call and of its reconcile is in the question without secrets."""
    store = AsyncInMemoryStore()
    runner = quick(store)

    def reconcile(state: Call, _key: str) -> Any:
        raise LookupError(f"no answer about {state.token.get_secret_value()}")

    @runner.node("pay", input=Call, output=Call, effect=True, reconcile=reconcile)
    async def pay(state: Call) -> Call:
        raise ConnectionResetError(f"reset after {state.token.get_secret_value()}")

    assert (await runner.run([pay], Call(), run_id="r")).status is RunStatus.SUSPENDED
    (question,) = store.waiting("r")
    assert "reset after **********; reconcile raised LookupError: no answer about **********" in (
        question.effect.cause
    )


async def test_the_end_of_plain_code_is_masked(caplog: pytest.LogCaptureFixture) -> None:
    """What a block of plain code raises is recorded without the secrets of its steps."""
    store = AsyncInMemoryStore()
    runner = quick(store)

    with pytest.raises(ValueError, match=re.escape(SECRET)):
        config = runner.config.with_run_id("r")
        async with context_of(runner, config) as ctx:
            await execute_step("step", same, Call(), ctx)
            raise ValueError(f"401 for {SECRET}")
    assert store.get_run("r").error == "ValueError: 401 for **********"


async def test_what_a_classifier_raises_is_masked(caplog: pytest.LogCaptureFixture) -> None:
    """The traceback of a classifier that raises is logged without the secrets of the attempt's input."""

    def classifier(exc: Exception, _context: Any) -> Any:
        raise ExceptionGroup("cannot tell", [ValueError(str(exc))])

    runner = quick(classifiers=[classifier])

    @runner.node("call", input=Call, output=Call)
    async def call(state: Call) -> Call:
        raise ValueError(state.token.get_secret_value())

    await runner.run([call], Call())
    assert "in classifier" in caplog.text
    assert "ValueError: **********" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("nested", [False, True])
async def test_what_a_flow_raises_is_masked(nested: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The body of a flow can raise with the secret of its input: record, message and log have it masked."""
    store = AsyncInMemoryStore()
    runner = quick(store)

    @stroma_flow("inner", input=Call, output=Call)
    async def inner(flow: Flow, state: Call) -> Call:
        raise ValueError(f"401 for {state.token.get_secret_value()}")

    @stroma_flow("outer", input=Call, output=Call)
    async def outer(flow: Flow, state: Call) -> Call:
        return await flow.run(inner, state)

    with caplog.at_level(logging.DEBUG, "stroma"):
        result = await runner.run(outer if nested else inner, Call(), run_id="r")
    assert SECRET not in f"{result.failure.message} {store.get_run('r')} {caplog.text}"
    assert "**********" in result.failure.message


@pytest.mark.parametrize("kind", ["parallel", "map"])
async def test_the_failure_of_a_group_is_masked(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """A child's exception group with the secret of its state is masked in both failures."""
    runner = quick()

    @runner.node("call", input=Call, output=Call)
    async def call(state: Call) -> Call:
        raise ExceptionGroup(f"of {SECRET}", [ValueError(state.token.get_secret_value())])

    group: Any = (
        map_over("calls", call, into="done") if kind == "map" else parallel(call, identity(runner, "other"))
    )
    with caplog.at_level(logging.DEBUG, "stroma"):
        result = await runner.run([group], Calls(calls=[Call()]) if kind == "map" else Call(), run_id="r")
    for message in (result.failure.message, result.failure.inner.message, caplog.text, result.to_html()):
        assert SECRET not in message
