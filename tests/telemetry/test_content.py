"""What leaves of states and messages: secrets in no mode, whatever became of their states."""

import asyncio
import base64
import json
import logging
from time import thread_time
from typing import Any
from urllib.parse import quote

import pytest
from prometheus_client import CollectorRegistry
from pydantic import AliasChoices, BaseModel, Field, RootModel, Secret, SecretBytes, SecretStr
from tests.kit import computing, context_of, noting, passing
from tests.receivers.sentry import RecordedSentry
from tests.telemetry.test_opentelemetry import Seen, quick

from stroma import NodeHooks, StromaRunner, execute_step
from stroma.adapters import Guard
from stroma.contracts.schema import Schema, schema_of
from stroma.telemetry import datadog_hooks, log_hooks, otel_hooks, prometheus_hooks, sentry_hooks
from stroma.telemetry.content import DENY_KEYS, Content

pytest_plugins = ["tests.receivers.fixtures"]


class Inner(BaseModel, extra="allow"):
    key: SecretStr = SecretStr("inner-value")


class State(BaseModel):
    text: SecretStr = SecretStr("text-value")
    data: SecretBytes = SecretBytes(b"bytes-value\xff")
    any: Secret[str] = Secret("any-value")
    inner: Inner = Inner(more=SecretStr("extra-value"))
    items: list[Any] = [{"key": (SecretStr("item-value"),)}, Secret(["list-value"])]


SECRETS = ("text", "bytes", "any", "inner", "extra", "item", "list")


def hides(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value if name == "message" else "..." for name, value in state.items()}


def fails(state: dict[str, Any]) -> dict[str, Any]:
    if "message" in state:
        return state
    raise ValueError("no")


@pytest.mark.core
@pytest.mark.parametrize("redact", [None, hides, fails])
@pytest.mark.parametrize("step", [False, True])
async def test_a_message_says_no_secret(redact: Any, step: bool) -> None:
    """Whatever type a secret has, wherever it is, a message that names it is sent without it."""
    seen = Seen()
    runner = quick(seen.hooks(content="redacted"), retries=0, redact=redact)

    @runner.node("node", input=State, output=State)
    async def node(state: State) -> State:
        raise ValueError(
            " ".join(f"{name}-value" for name in SECRETS) + f" {state.data.get_secret_value()!r}"
        )

    if step:
        ctx = context_of(runner)
        await execute_step("node", node, State(), ctx)
    else:
        await runner.run([node], State())
    text = seen.span("stroma.node node").status.description
    assert text.split() == ["**********"] * len(SECRETS) + ["b'**********'"]
    assert "-value" not in str([span.to_json() for span in seen.spans])


@pytest.mark.core
async def test_no_exporter_sends_what_redact_removes(caplog: pytest.LogCaptureFixture) -> None:
    """A message is exported as it was recorded: without the values that redact removes from the states."""

    class Person(BaseModel):
        ssn: str

    def hide(state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "ssn": "***"} if "ssn" in state else state

    ssn = "-".join(["078", "05", "1120"])  # Sentry sends lines of source.
    seen = Seen()
    caplog.set_level(logging.DEBUG, "stroma")
    with RecordedSentry() as sentry:
        hooks = seen.hooks(content="redacted", attempts="spans") | log_hooks(content="redacted")
        hooks = hooks | sentry_hooks(client=sentry.client, content="redacted")
        runner = quick(hooks, retries=1, redact=hide)

        @runner.node("use", input=Person, output=Person)
        async def use(state: Person) -> Person:
            try:
                raise LookupError(f"unknown: {state.ssn}")
            except LookupError as error:
                raise ConnectionError(f"bad ssn {state.ssn}") from error

        @runner.flow("flow", input=Person, output=Person)
        async def flow(flow: Any, state: Person) -> Person:
            raise ConnectionError(f"bad ssn {state.ssn}")

        for target in ([use], flow):
            result = await runner.run(target, Person(ssn=ssn))
            assert ssn in str(result.failure.exception)
    values = [one["value"] for event in sentry.transport.events for one in event["exception"]["values"]]
    assert values == ["[redacted]", "bad ssn [redacted]", "bad ssn [redacted]"]
    sent = [span.to_json() for span in seen.spans], sentry.transport.events, sentry.transport.transactions
    assert ssn not in f"{sent} {[vars(one) for one in caplog.records]}"
    assert str(sent[0]).count("bad ssn [redacted]") > 4
    assert 'error_message="bad ssn [redacted]"' in caplog.text


@pytest.mark.core
async def test_a_state_that_cannot_be_written_out() -> None:
    """A number that is too long for text is replaced by its size."""

    class Huge(BaseModel):
        n: Any = 0

    seen = Seen()
    hooks = seen.hooks(content="redacted")
    runner = quick(hooks, retries=0)

    node = runner.node("node", input=Huge, output=Huge)(passing())
    await runner.run([node], Huge(n=10**5000))
    assert hooks.errors == {}
    shown = seen.span("stroma.node node").attributes["input.value"]
    assert shown.startswith('{"n": "<int of 16,610 bits>"}')


SECRET_TEXTS = ("p@ss/w0rd+1=", "sk-context-222")


class Document(BaseModel):
    title: str
    text: str


class Shelf(BaseModel):
    documents: list[Document] = []
    more: dict[str, Any] = {}


SHELF = Shelf(
    documents=[Document(title=f"title {n}", text="x" * 5000) for n in range(200)],
    more={"rows": [{"a": n, "b": "y"} for n in range(1000)]},
)


def exporters(sentry: RecordedSentry, content: Any) -> list[Any]:
    """All that send states, with all of them sampled and written."""
    from tests.telemetry.test_counted_once import Otel, Tracer

    logger = logging.getLogger("test.content")
    logger.setLevel("DEBUG")
    logger.propagate = False
    logger.handlers = [logging.NullHandler()]
    return [
        Otel().hooks(content=content),
        sentry_hooks(client=sentry.client, content=content),
        datadog_hooks(tracer=Tracer(), content=content),
        log_hooks(logger, content=content),
    ]


@pytest.mark.core
async def test_a_large_state_does_not_stop_the_event_loop(sentry: RecordedSentry) -> None:
    """A state of 1 MB, content="redacted" and four exporters: no step of the event loop takes 20 ms more."""
    steps: dict[bool, float] = {}
    for watched in (False, True) * 3:  # The least of three: other processes share the caches.
        runner = StromaRunner.quick(hooks=exporters(sentry, "redacted") if watched else None)

        @runner.node("node", input=Shelf, output=Shelf)
        async def node(state: Shelf) -> Shelf:
            await asyncio.sleep(0)
            return state

        longest = 0.0
        for _ in range(2):
            coroutine: Any = runner.run([node], SHELF)
            task = asyncio.ensure_future(coroutine)
            while not task.done():
                begin = thread_time()
                await asyncio.sleep(0)
                longest = max(longest, thread_time() - begin)
            await task
        steps[watched] = min(longest, steps.get(watched, 9.0))
    assert steps[True] - steps[False] < 0.02


@pytest.mark.core
@pytest.mark.parametrize("content", ["none", "redacted"])
async def test_no_exporter_copies_a_state(content: Any, sentry: RecordedSentry) -> None:
    """Sets that read no state, as all exporters, make the engine copy none for them."""
    registry = prometheus_hooks(registry=CollectorRegistry())
    copied: list[str] = []

    class Copied(Schema):
        def state(self, model: BaseModel) -> dict[str, Any]:
            copied.append(self.model.__name__)
            return Schema.state(self, model)

    seen: list[Any] = []

    see = noting(seen, lambda *arguments: arguments[2])
    unread = NodeHooks(on_node_start=see, on_node_success=see, on_run_start=see, reads_state=False)
    runner = quick([*exporters(sentry, content), registry, unread], retries=0)

    node = runner.node("node", input=Shelf, output=Shelf)(passing())
    schema = schema_of(Shelf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "state", Copied.state.__get__(schema), raising=False)
        result = await runner.run([node], SHELF)
    assert result.hook_errors == []
    assert copied == []
    assert seen == [{}, {}, {}]


async def test_a_set_that_reads_no_state_gets_none_of_the_result() -> None:
    """The result at the end of a run has its events and totals for such a set, and no state."""
    results: list[Any] = []

    ended = noting(results, lambda _, result: result)
    sets = [NodeHooks(on_run_end=ended, reads_state=False), NodeHooks(on_run_end=ended)]
    runner = quick(sets, retries=0)
    node = runner.node("node", input=Document, output=Document)(computing(lambda state: (state, 3)))
    await runner.run([node], Document(title="a", text="b"))
    full, unread = results
    assert full.final_state == Document(title="a", text="b")
    assert unread.final_state is None
    assert unread.total_tokens == full.total_tokens == 3
    assert [(e.node_id, e.input_state, e.output_state) for e in unread.trace] == [("node", {}, {})]


async def test_nothing_is_made_for_a_logger_that_is_off(sentry: RecordedSentry) -> None:
    """A logger without handlers for the level, and a span that is not sampled, need no content."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

    off = logging.getLogger("test.content.off")
    off.setLevel(logging.CRITICAL)
    with RecordedSentry(traces_sample_rate=0.0) as unsampled:
        hooks = [
            log_hooks(off, content="redacted"),
            otel_hooks(tracer=TracerProvider(sampler=ALWAYS_OFF), content="redacted"),
            sentry_hooks(client=unsampled.client, content="redacted"),
        ]
        runner = quick(hooks, retries=0)

        node = runner.node("node", input=Document, output=Document)(passing())
        made: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Content, "state", lambda *arguments: made.append(arguments) or "")
            await runner.run([node], Document(title="a", text="b"))
        assert made == []


@pytest.mark.core
async def test_denied_names_are_known_by_their_aliases() -> None:
    """A field whose alias is a denied name is not sent, in models inside of the state neither."""

    class Inner(BaseModel):
        value: str = Field(default="inner-hidden", validation_alias=AliasChoices("x", "db_password"))

    class Outer(BaseModel):
        plain: str = "shown"
        text: str = Field(default="outer-hidden", alias="apiKey")
        inner: list[Inner] = [Inner()]

    for redact in (None, lambda state: {**state, "extra": 1}):
        seen = Seen()
        runner = quick(seen.hooks(content="redacted"), retries=0, redact=redact)

        node = runner.node("node", input=Outer, output=Outer)(passing())
        await runner.run([node], Outer())
        shown = json.loads(seen.span("stroma.node node").attributes["input.value"])
        assert (shown["plain"], shown["text"]) == ("shown", "[redacted]")
        if redact is None:
            assert shown["inner"] == [{"value": "[redacted]"}]


@pytest.mark.core
async def test_a_secret_at_the_end_of_what_is_sent() -> None:
    """A secret that begins before max_bytes and ends after it is masked."""
    seen = Seen()
    runner = quick(seen.hooks(content="redacted", max_bytes=40), retries=0)

    class Long(BaseModel):
        text: str
        key: SecretStr = SecretStr("hunter2-hunter2-hunter2")

    node = runner.node("node", input=Long, output=Long)(passing())
    await runner.run([node], Long(text="x" * 25 + "hunter2-hunter2-hunter2" + "y" * 100_000))
    shown = seen.span("stroma.node node").attributes["input.value"]
    assert "hunter" not in shown
    assert "truncated, over" in shown


@pytest.mark.core
async def test_encoded_secrets_in_messages_and_hook_errors(caplog: pytest.LogCaptureFixture) -> None:
    """A secret of state or context is masked in messages and hook errors in every encoding."""

    class Holder(BaseModel):
        token: SecretStr = SecretStr(SECRET_TEXTS[0])

    def forms(text: str) -> str:
        data = text.encode()
        return " ".join(
            [text, quote(text, safe=""), base64.b64encode(data).decode(), data.hex(), text.upper()]
        )

    text = " ".join(map(forms, SECRET_TEXTS))

    async def bad(*_: Any) -> None:
        raise ValueError(text)

    seen = Seen()
    sets = [seen.hooks(content="redacted"), NodeHooks(on_node_start=bad)]
    runner = quick(sets, retries=0, context={"key": SecretStr(SECRET_TEXTS[1])})

    @runner.node("node", input=Holder, output=Holder)
    async def node(state: Holder, ctx: dict[str, Any]) -> Holder:
        await bad()
        return state

    result = await runner.run([node], Holder())
    assert len(result.hook_errors) == 1
    sent = str([span.to_json() for span in seen.spans]) + caplog.text
    for secret in SECRET_TEXTS:
        for form in (secret, quote(secret, safe=""), secret.encode().hex(), secret.upper()):
            assert form not in sent, form
        assert base64.b64encode(secret.encode()).decode()[:-4] not in sent


class Loose(BaseModel):
    v: Any = None


HELD = "hunter2-value"


async def sent_with(value: Any) -> str:
    """Return the spans of a node that returns this value."""
    seen = Seen()
    runner = quick(seen.hooks(content="redacted", deny_keys=(*DENY_KEYS, "straße")), retries=0)

    a = runner.node("a", input=Loose, output=Loose)(passing())
    await runner.run([a], Loose(v=value))
    return "".join(span.to_json() for span in seen.spans)


@pytest.mark.parametrize(
    "value",
    [
        {"arguments": json.dumps({"password": HELD})},
        {"arguments": json.dumps({"call": {"headers": [["Authorization", HELD]]}})},
        {"arguments": json.dumps({"inner": json.dumps({"password": HELD})})},
        {"arguments": " \n" + json.dumps([{"password": HELD}])},
        {"arguments": json.dumps({"password": HELD})[:-1]},
        {"arguments": json.dumps({"password": HELD, "more": "x" * 300_000})},
        {"arguments": json.dumps({"password": HELD}).encode()},
        {"arguments": str({"password": HELD, "user": "ada"})},
        {"headers": [["authorization", HELD], ["accept", "text"]]},
        {"headers": [(b"cookie", HELD.encode())]},
        {"headers": [{"name": "X-Api-Key", "value": HELD}]},
        {"headers": [{"key": "token", "values": [HELD]}]},
        {"headers": [{"Name": "Authorization", "Value": HELD}]},
        {"arguments": json.dumps({"straße": HELD})},
        {"arguments": json.dumps({"inner": json.dumps({"straße": HELD})})},
    ],
    ids=str,
)
async def test_denied_names_in_texts_and_pairs(value: Any) -> None:
    """A denied name hides its value in a text of JSON, in a list of pairs and in a list of headers, too."""
    sent = await sent_with(value)
    assert "[redacted]" in sent
    assert HELD not in sent


@pytest.mark.parametrize(
    "value",
    [
        json.dumps({"max_tokens": 10, "text": "the password is secret"}),
        "[note] the password, or token: ask",
        [["accept", "text"], ["one", "two", "three"]],
        [{"name": "ada", "value": 3}],
        "{not json}",
    ],
    ids=str,
)
async def test_other_texts_and_pairs_are_sent_as_they_are(value: Any) -> None:
    """A text without a denied name, and a pair of other names, are unchanged."""
    assert "[redacted]" not in await sent_with(value)


class Balances(RootModel[dict[str, int]]):
    pass


async def test_keys_of_a_root_model_are_content() -> None:
    """By default of a dict of addresses its size is sent, and no address."""
    seen = Seen()
    runner = StromaRunner.quick(hooks=seen.hooks())

    @runner.node
    async def read(state: Balances) -> Balances:
        return state

    await runner.run([read], Balances({"ada@example.org": 7}))
    shown = [
        (span.attributes or {}).get(name) for span in seen.spans for name in ("stroma.input", "stroma.output")
    ]
    assert shown == ['"dict[1]"'] * 4


@pytest.mark.parametrize("content", ["none", "redacted"])
def test_a_guarded_value_is_shown_as_what_it_is(content: Any) -> None:
    """A text is shown as a text, any other value as JSON, a missing one not at all; no key is added."""
    seen = Seen()
    guard = Guard(StromaRunner.quick(hooks=seen.hooks(content=content)))
    values: list[Any] = ["done", '{"password": "hunter2", "n": 1}', [1, "two"], 7, None, {"root": 1}]
    for number, value in enumerate(values):
        with guard.run():
            guard.wrap(f"step {number}", lambda value: value, input_view=lambda args, _: args[0])(value)
    shown = {
        span.name.removeprefix("stroma.node "): [
            (span.attributes or {}).get(name)
            for name in ("output.value", "output.mime_type", "stroma.output")
        ]
        for span in seen.spans
        if span.name.startswith("stroma.node ")
    }
    roots = [dict(span.attributes or {}) for span in seen.named("invoke_workflow pipeline")]
    assert not any("input.value" in root or "stroma.input" in root for root in roots)
    if content == "none":
        shapes = [shape for _, _, shape in shown.values()]
        assert shapes == ['"str[4]"', '"str[31]"', '"list[2]"', '"int"', None, '{"root": "int"}']
        return
    text, data = "text/plain", "application/json"
    assert list(shown.values()) == [
        ["done", text, None],
        ['{"password": "[redacted]", "n": 1}', text, None],
        ['[1, "two"]', data, None],
        ["7", data, None],
        [None, None, None],
        ['{"root": 1}', data, None],
    ]
