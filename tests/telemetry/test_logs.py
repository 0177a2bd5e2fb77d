"""log_hooks: one line per event, with what it is about as fields."""

import logging
from typing import Any

import pytest
import structlog
from pydantic import BaseModel, SecretStr
from tests.kit import ONCE, failing_with, words

from stroma import RunStatus, StromaRunner, Usage, current_node
from stroma.telemetry import DENY_KEYS, log_hooks
from stroma.telemetry.content import DeniedNames


class State(BaseModel):
    n: int = 0
    password: str = "letmein"
    key: SecretStr = SecretStr("sk-hunter2")


def quick(hooks: Any, **options: Any) -> StromaRunner:
    return StromaRunner.quick(hooks=hooks, policy_map=ONCE, pipeline="letters", **options)


def flaky(runner: StromaRunner, failures: int = 1) -> Any:
    @runner.node("flaky", input=State, output=State)
    async def node(state: State) -> Any:
        if current_node().attempt <= failures:
            raise ConnectionError(f"no for {state.key.get_secret_value()}")
        return state, 10, 5, "gpt-4o-mini"

    return node


def events(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [record for record in caplog.records if record.name == "stroma.events"]


async def test_conversation_user_and_tags_are_fields(caplog: pytest.LogCaptureFixture) -> None:
    """Every line has the conversation, user and tags of its run, if any, as fields and in its text."""
    caplog.set_level(logging.DEBUG)
    runner = quick(log_hooks(), tags=("beta", "customer=42"))
    await runner.run([flaky(runner)], State(), conversation="thread 17", user="ada")
    lines = events(caplog)
    assert {(line.conversation, line.user, *line.tags) for line in lines} == {
        ("thread 17", "ada", "beta", "customer=42")
    }
    for line in lines:
        assert ' conversation="thread 17" user=ada tags="beta,customer=42" ' in line.getMessage()
    caplog.clear()
    await quick(log_hooks()).run([flaky(runner)], State())
    assert not any({"conversation", "user", "tags"} & vars(line).keys() for line in events(caplog))


@pytest.mark.core
async def test_one_line_per_event(caplog: pytest.LogCaptureFixture) -> None:
    """Each event is a line of its own level, whose record has run_id, node_id, attempt and the rest."""
    caplog.set_level(logging.DEBUG)
    runner = quick(log_hooks())
    result = await runner.run([flaky(runner)], State())
    lines = events(caplog)
    assert [(line.levelname, line.getMessage().partition(":")[0]) for line in lines] == [
        ("INFO", "run started"),
        ("DEBUG", "node started"),
        ("WARNING", "node failure"),
        ("INFO", "node retried"),
        ("DEBUG", "node started"),
        ("INFO", "node success"),
        ("INFO", "run ended"),
    ]
    assert {line.run_id for line in lines} == {result.run_id}
    failed, succeeded, ended = lines[2], lines[5], lines[6]
    assert (failed.node_id, failed.attempt, failed.failure_class) == ("flaky", 1, "RECOVERABLE")
    assert failed.reason == "connection"
    assert (succeeded.attempt, succeeded.tokens, succeeded.model) == (2, 15, "gpt-4o-mini")
    assert (ended.status, ended.tokens) == ("COMPLETED", 15)


async def test_a_cost_without_tokens_is_a_field(caplog: pytest.LogCaptureFixture) -> None:
    """An attempt that is priced per call has its cost and its model in its line."""
    caplog.set_level(logging.INFO)
    runner = quick(log_hooks())

    @runner.node("draw", input=State, output=State)
    async def draw(state: State) -> Any:
        return state, Usage(model="dall-e-3", cost_usd=0.04)

    await runner.run([draw], State())
    drawn = events(caplog)[1]
    assert (drawn.tokens, drawn.cost_usd, drawn.model) == (0, 0.04, "dall-e-3")


@pytest.mark.core
async def test_a_failed_run_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """Only the end of a run that failed is at ERROR: an alert on it is one per run."""
    runner = quick(log_hooks())
    assert (await runner.run([flaky(runner, 9)], State())).status is RunStatus.PARTIAL
    (line,) = [line for line in events(caplog) if line.levelno >= logging.ERROR]
    assert (line.error_type, line.failed_node_id) == ("ConnectionError", "flaky")


async def test_content(caplog: pytest.LogCaptureFixture) -> None:
    """No values and messages by default; with "redacted" what is not secret, by type or by name."""
    caplog.set_level(logging.DEBUG, logger="stroma.events")
    runner = quick(log_hooks())
    await runner.run([flaky(runner, 9)], State())
    assert "letmein" not in "".join(str(vars(line)) for line in events(caplog))
    assert "no for" not in "".join(str(vars(line)) for line in events(caplog))
    caplog.clear()
    runner = quick(log_hooks(content="redacted"))
    await runner.run([flaky(runner, 9)], State(n=7))
    text = "".join(str(vars(line)) for line in events(caplog))
    assert '"n": 7' in text
    assert "no for **********" in text
    assert "letmein" not in text
    assert "hunter2" not in text


async def test_a_secret_that_redact_takes_out_is_in_no_message(caplog: pytest.LogCaptureFixture) -> None:
    """redact may remove a secret from states; what exceptions say of it is hidden all the same."""

    def redact(state: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in state.items() if name != "key"}

    runner = quick(log_hooks(content="redacted"), redact=redact)
    await runner.run([flaky(runner, 9)], State())
    text = "".join(str(vars(line)) for line in events(caplog))
    assert "no for **********" in text
    assert "hunter2" not in text


DENIED = words("""
    api_key API-Key apiKey openai_api_key openaiApiKey OPENAI_API_KEY HTTPPassword db_password x-api-key
    openai.api.key http.request.header.Authorization config/openai.api_key Authorization access_token
    token github_token csrf_token accessToken secret_key aws_secret_access_key clientSecret access_key
    account_key signing_key encryption_key ssh_key passwords api_keys dbpassword db_pass password1
    password_hash passcode pin otp jwt session_id sessionid set-cookie cookies connection_string
    database_url webhook_url private_key_pem proxy_authorization credential x-amz-security-token
""")
ALLOWED = words("""
    max_tokens maxTokens tokens_used total_tokens token_count tokens tokenizer secretary secretary_name
    author authority compass first_pass spin shipping session cookie_policy api_key_count lapikey
""")


@pytest.mark.parametrize(
    ("name", "denied"),
    [*((name, True) for name in (*DENIED, "api key ")), *((name, False) for name in (*ALLOWED, ""))],
)
def test_denied_names(name: str, denied: bool) -> None:
    """A name is denied if its last words are, in any spelling; a part of a word is not, nor a token count."""
    assert (name in DeniedNames(DENY_KEYS)) is denied


@pytest.mark.parametrize(
    ("key", "name", "denied"),
    [
        ("iban", "customerIban", True),
        ("iban", "ibans", False),
        ("*iban*", "customer_ibans", True),
        ("iban_*", "iban_de", True),
        ("iban_*", "my_iban_de", False),
        ("*_iban", "my_iban", True),
        ("*_iban", "iban", False),
        ("Iban-*", "ibanDe", True),
    ],
)
def test_patterns_of_denied_names(key: str, name: str, denied: bool) -> None:
    """A key with * at an end matches the whole name, in words with _ between them."""
    assert (name in DeniedNames([key])) is denied


async def test_structlog() -> None:
    """A logger of structlog gets the event and its fields; without a logger its configuration is used."""
    try:
        with structlog.testing.capture_logs() as lines:
            structlog.configure(processors=structlog.get_config()["processors"])
            for hooks in (log_hooks(structlog.get_logger()), log_hooks()):
                runner = quick(hooks)
                await runner.run([flaky(runner, 0)], State(), run_id="r")
        names = [line["event"] for line in lines if line["log_level"] != "debug"]
        assert names == ["run started", "node success", "run ended"] * 2
        assert {line["run_id"] for line in lines} == {"r"}
    finally:
        structlog.reset_defaults()


@pytest.mark.core
async def test_an_event_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """Ids and messages are any text without line breaks; the fields have them as they are."""
    caplog.set_level(logging.DEBUG)
    runner = quick(log_hooks(content="redacted"))

    node = runner.node("node\r\u2028x", input=State, output=State)(failing_with(ValueError, "one\ntwo"))
    await runner.run([node], State(), run_id="a\nERROR b")
    lines = events(caplog)
    assert all(len(line.getMessage().splitlines()) == 1 for line in lines)
    assert {line.run_id for line in lines} == {"a\nERROR b"}
    assert "one\ntwo" in {getattr(line, "error_message", None) for line in lines}


@pytest.mark.parametrize(
    "wrapper",
    [
        structlog.BoundLogger,
        structlog.stdlib.BoundLogger,
        structlog.make_filtering_bound_logger(logging.INFO),
    ],
)
async def test_each_kind_of_logger_of_structlog(wrapper: Any) -> None:
    """Generic, stdlib and filtering loggers of structlog, with values bound, write the same lines."""
    lines: list[Any] = []

    def keep(_logger: Any, level: str, fields: Any) -> Any:
        lines.append((level, fields["event"], fields["bound"]))
        raise structlog.DropEvent

    logger = structlog.wrap_logger(structlog.PrintLogger(), wrapper_class=wrapper, processors=[keep])
    hooks = log_hooks(logger.bind(bound=1))
    runner = quick(hooks)
    await runner.run([flaky(runner)], State())
    assert hooks.errors == {}
    assert [line for line in lines if line[0] != "debug"] == [
        ("info", "run started", 1),
        ("warning", "node failure", 1),
        ("info", "node retried", 1),
        ("info", "node success", 1),
        ("info", "run ended", 1),
    ]


async def test_starts_of_nodes_are_asked_for_once_a_run(caplog: pytest.LogCaptureFixture) -> None:
    """A logger that is set to DEBUG in a run shows the starts of nodes of later runs."""
    caplog.set_level(logging.INFO, logger="stroma.events")
    runner = quick(log_hooks())

    @runner.node("louder", input=State, output=State)
    async def louder(state: State) -> State:
        caplog.set_level(logging.DEBUG, logger="stroma.events")
        return state

    starts: list[int] = []
    for _ in range(2):
        await runner.run([louder, flaky(runner, 0)], State())
        starts.append(sum(line.message.startswith("node started") for line in events(caplog)))
    assert starts == [0, 2]


async def test_lines_of_the_engine_name_their_run(caplog: pytest.LogCaptureFixture) -> None:
    """Every line of the engine about a run begins with its id, and a FAILED run ends with a line at ERROR."""
    caplog.set_level(logging.INFO, logger="stroma")
    runner = StromaRunner.quick(policy_map=ONCE, pipeline="100 %")
    post = runner.node("post", input=State, output=State)(failing_with(ImportError, "no"))
    await runner.run([post], State(), run_id="a")
    await runner.run([flaky(runner)], State(), run_id="b")
    await runner.run([flaky(runner, 9)], State(), run_id="c")
    lines = [record for record in caplog.records if record.name == "stroma"]
    assert lines
    for line in lines:
        assert line.getMessage().startswith(f"run {vars(line)['run_id']!r}: ")
    ends = {
        vars(line)["run_id"]: (line.levelname, line.getMessage())
        for line in lines
        if "ended" in line.getMessage()
    }
    assert ends == {
        "a": ("ERROR", "run 'a': pipeline '100 %' ended: FAILED at node 'post': TERMINAL (bug)"),
        "b": ("INFO", "run 'b': pipeline '100 %' ended: COMPLETED"),
        "c": (
            "WARNING",
            "run 'c': pipeline '100 %' ended: PARTIAL at node 'flaky': RECOVERABLE (connection)",
        ),
    }
