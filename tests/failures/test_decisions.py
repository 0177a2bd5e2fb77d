"""What a failure is taken for, and whether it is tried again, case by case."""

import asyncio
import logging
import math
from typing import Any

import pytest
from pydantic import RootModel, ValidationError
from tests.kit import NEVER, Num, failing_with, node, quick

from stroma import BudgetExceeded, ContractViolation, FailureClass, FailurePolicy, RunStatus, Suspend
from stroma._utils.access import kind_of, message_of, type_name
from stroma.contracts import NotSerialisable
from stroma.cost import UsageError
from stroma.failures import (
    CircuitOpen,
    Failure,
    LimitError,
    NodeContext,
    RetryBudget,
    WaitedTooLong,
    classify,
    default_policy_map,
)
from stroma.failures.errors import RecordedVerdict, RunFailed
from stroma.failures.failure import diagnose, isinstance_by_type
from stroma.failures.policy import Retry, Stop, decide, follow_up, policy_for

RECOVERABLE, TERMINAL, AMBIGUOUS = FailureClass.RECOVERABLE, FailureClass.TERMINAL, FailureClass.AMBIGUOUS
CONTEXT = NodeContext("node", 4, "run")


def exception_with(kind: type[BaseException], **attributes: Any) -> Any:
    """An instance of an exception, without what its own __init__ asks for."""
    error = kind.__new__(kind, "what was wrong")
    error.__dict__.update(attributes)
    error.args = ("what was wrong",)
    return error


class Response:
    def __init__(self, status: int, headers: dict[str, str]) -> None:
        self.status_code, self.headers = status, headers


class Provider(Exception):
    """What the SDK of a provider raises."""

    def __init__(self, status: int, **headers: str) -> None:
        super().__init__(f"status {status}")
        self.status_code = status
        self.response = Response(status, {name.replace("_", "-"): value for name, value in headers.items()})


def test_the_classes_of_failures() -> None:
    """They are text, written to stores; each finds the same in a dict as its text."""
    assert [(one.name, str(one)) for one in FailureClass] == [
        (word, word) for word in ("RECOVERABLE", "TERMINAL", "AMBIGUOUS")
    ]
    assert {FailureClass.TERMINAL: 1}["TERMINAL"] == 1
    policies = {str(one): FailurePolicy(max_retries=n) for n, one in enumerate(FailureClass)}
    assert [policy_for(one, None, policies).max_retries for one in FailureClass] == [0, 1, 2]
    assert {hash(one) == hash(str(one)) for one in FailureClass} == {True}


class OurTimeout(TimeoutError):
    pass


@pytest.mark.parametrize(
    ("kind", "failure_class", "reason"),
    [
        (ContractViolation, TERMINAL, "contract"),
        (BudgetExceeded, RECOVERABLE, "budget"),
        (UsageError, TERMINAL, "usage"),
        (NotSerialisable, TERMINAL, "not_serialisable"),
        (TimeoutError, RECOVERABLE, "timeout"),
        (OurTimeout, RECOVERABLE, "timeout"),
        (LimitError, TERMINAL, "limit"),
        (WaitedTooLong, RECOVERABLE, "limit"),
        (CircuitOpen, RECOVERABLE, "circuit_open"),
        (ValueError, AMBIGUOUS, None),
        (KeyError, AMBIGUOUS, None),
    ],
)
def test_class_and_reason_of_an_exception(kind: Any, failure_class: FailureClass, reason: str | None) -> None:
    """Our own errors and time limits are known by their type, all else is ambiguous."""
    error = (
        exception_with(kind, dimension="cost", limit=1, actual=2, node_id="a")
        if kind is BudgetExceeded
        else exception_with(kind)
    )
    result = diagnose(error, CONTEXT)
    assert (result.failure_class, result.reason) == (failure_class, reason)
    assert classify(error, CONTEXT) is failure_class
    assert (result.exception, result.node_id, result.attempt) == (error, "node", 4)
    assert result.retry_after_seconds is None
    assert result.message == message_of(error)


def test_what_a_providers_error_says() -> None:
    """Its class, its reason and the wait that it asks for."""
    result = diagnose(Provider(429, retry_after="7"), CONTEXT)
    assert result.exception.args == ("status 429",)
    assert result == Failure(
        result.exception, RECOVERABLE, "node", 4, "status 429", "rate_limit", retry_after_seconds=7.0
    )
    assert diagnose(Provider(401), CONTEXT).failure_class is TERMINAL
    assert diagnose(Provider(401), CONTEXT).retry_after_seconds is None


def test_a_failure_of_another_process_is_what_that_process_recorded() -> None:
    """Type, class, reason and wait are the recorded ones; nothing is read from the exception."""
    error = RunFailed.recorded("no", "openai.RateLimitError", RecordedVerdict(TERMINAL, "quota", 7.0))
    assert diagnose(error, CONTEXT) == Failure(error, TERMINAL, "node", 4, "no", "quota", 7.0)
    assert (type_name(error), kind_of(error)) == ("openai.RateLimitError", "RateLimitError")


def test_an_exception_of_the_same_name_is_shown_by_its_name() -> None:
    """A class of the user's that is called RunFailed is not Stroma's, whatever its attributes."""

    class RunFailed(Exception):
        def __init__(self) -> None:
            super().__init__("no such job")
            self.type_name = "nightly"

    assert type_name(RunFailed()).endswith("<locals>.RunFailed")
    assert kind_of(RunFailed()) == "RunFailed"


@pytest.mark.parametrize(
    ("base", "expected"),
    [(UsageError, (TERMINAL, "usage", None)), (TimeoutError, (RECOVERABLE, "rate_limit", 7.0))],
)
def test_our_own_errors_are_what_they_are(base: type[Exception], expected: Any) -> None:
    """An error of ours is read as that, whatever else it carries; of a TimeoutError the status counts."""

    class Both(base):  # type: ignore[misc,valid-type]
        status_code = 429
        response = Response(429, {"retry-after": "7"})

    result = diagnose(Both("no"), CONTEXT)
    assert (result.failure_class, result.reason, result.retry_after_seconds) == expected


def test_classifiers_are_asked_in_order() -> None:
    """The first that answers decides the class, the reason stays; each gets the exception and its place."""
    requests: list[Any] = []

    def says(answer: Any) -> Any:
        def classifier(error: Exception, context: NodeContext) -> Any:
            requests.append((answer, error, context))
            return answer

        return classifier

    error = Provider(429, retry_after="7")
    result = diagnose(error, CONTEXT, [says(None), says(TERMINAL), says(AMBIGUOUS)])
    assert (result.failure_class, result.reason, result.retry_after_seconds) == (TERMINAL, "rate_limit", 7.0)
    assert requests == [(None, error, CONTEXT), (TERMINAL, error, CONTEXT)]
    assert diagnose(error, CONTEXT, [says("AMBIGUOUS")]).failure_class is AMBIGUOUS
    assert diagnose(error, CONTEXT, [says(None)]).failure_class is RECOVERABLE
    assert diagnose(ValueError(), CONTEXT, [says(None)]).failure_class is AMBIGUOUS
    assert diagnose(error, CONTEXT, []).failure_class is RECOVERABLE
    assert classify(error, CONTEXT, [says(TERMINAL)]) is TERMINAL


@pytest.mark.parametrize("raised", [RuntimeError, asyncio.CancelledError, None])
def test_a_classifier_that_fails_is_skipped(
    raised: type[BaseException] | None, caplog: pytest.LogCaptureFixture
) -> None:
    """G2: A classifier that raises or answers nonsense is named in the log, and the next one is asked."""

    def wrong(error: Exception, context: NodeContext) -> Any:
        if raised is not None:
            raise raised("broken")
        return "nonsense"

    assert diagnose(ValueError(), CONTEXT, [wrong, lambda *_: TERMINAL]).failure_class is TERMINAL
    (record,) = caplog.records
    assert (record.name, record.levelno, record.run_id) == ("stroma", logging.WARNING, "run")
    assert record.getMessage() == f"classifier {wrong!r} raised for node 'node'; it is skipped"
    assert record.exc_info[0] is (raised or ValueError)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, GeneratorExit, BaseException])
def test_a_classifier_does_not_swallow_an_interrupt(stop: type[BaseException]) -> None:
    """What stops the process comes out of it."""

    def stops(error: Exception, context: NodeContext) -> FailureClass:
        raise stop

    with pytest.raises(stop):
        diagnose(ValueError(), CONTEXT, [stops])


class Speaks(Exception):
    def __init__(self, says: Any) -> None:
        self.says = says

    def __str__(self) -> str:
        if isinstance(self.says, BaseException):
            raise self.says
        return self.says


class Rude(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("text"), "text"),
        (ValueError(), "ValueError"),
        (ValueError(""), "ValueError"),
        (Speaks("gr\u00fcn \ud800"), "gr\u00fcn \\ud800"),
        (Speaks(RuntimeError()), "Speaks"),
        (Speaks(Rude()), "Speaks"),
        (Speaks(7), "Speaks"),
    ],
)
def test_the_message_of_an_exception(error: BaseException, message: str) -> None:
    """Its text, as it can be stored; the name of its type where there is none."""
    assert message_of(error) == message


def test_the_message_of_an_exception_is_a_plain_str() -> None:
    """A subclass of str, which may have methods of its own, does not get into traces and stores."""

    class Text(str):
        pass

    assert type(message_of(Speaks(Text("text")))) is str


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_message_does_not_swallow_an_interrupt(stop: type[BaseException]) -> None:
    """What stops the process comes out, also while an exception is asked for its text."""
    with pytest.raises(stop):
        message_of(Speaks(stop()))


def test_what_an_exception_is_is_told_by_its_type() -> None:
    """A hostile one is not asked."""

    class Hostile(ValueError):
        @property
        def __class__(self) -> Any:
            raise RuntimeError

    assert isinstance_by_type(Hostile(), ValueError) is True
    assert isinstance_by_type(Hostile(), KeyError) is False


class Values(RootModel[list[int]]):
    pass


def test_a_suspension_has_its_reason_and_the_schema_of_its_answer() -> None:
    """None if any answer will do; a model or a root model otherwise."""
    assert (str(Suspend("why")), Suspend("why").reason, Suspend("why").schema) == ("why", "why", None)
    assert Suspend("why", schema=Num).schema is Num
    assert Suspend("why", schema=Values).schema is Values

    class Silent(Suspend):
        def __init__(self) -> None:
            self.reason = "silent"

    assert Silent().schema is None

    class Ask(Suspend):
        def __init__(self, who: str) -> None:
            super().__init__(f"ask {who}", schema=Num)

    assert (str(Ask("the boss")), Ask("the boss").reason) == ("ask the boss", "ask the boss")
    assert Ask("the boss").schema == Num


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        (int, "<class 'int'>"),
        (Num(), "Num(n=0)"),
        ("x" * 200, "'" + "x" * 99 + "..."),
        (0, "0"),
        (list[int], "list[int]"),
    ],
)
def test_a_suspension_that_asks_for_no_model_says_so(wrong: Any, shown: str) -> None:
    """What it asks for, in a line, and the mend."""
    with pytest.raises(TypeError) as caught:
        Suspend("why", schema=wrong)
    assert (
        str(caught.value)
        == f"the schema of Suspend must be a pydantic model, got {shown}; pass a RootModel for plain values"
    )


def test_the_policies_that_hold_where_nobody_gave_any() -> None:
    """Three retries, none, one; in dicts and policies of their own."""
    one, other = default_policy_map(), default_policy_map()
    assert one == other
    retries = {kind: (p.max_retries, p.backoff_seconds) for kind, p in one.items()}
    assert retries == {RECOVERABLE: (3, 1.0), TERMINAL: (0, 0.0), AMBIGUOUS: (1, 0.5)}
    for kind, policy in one.items():
        assert policy is not other[kind]
        assert policy.model_dump(exclude={"max_retries", "backoff_seconds"}) == {
            "multiplier": 1.0,
            "max_backoff_seconds": 60.0,
            "jitter": True,
            "max_retry_after_seconds": 120.0,
        }
    assert FailurePolicy() == one[RECOVERABLE]
    one[RECOVERABLE].max_retries = 99
    del one[TERMINAL]
    assert default_policy_map() == other


@pytest.mark.parametrize(
    ("field", "least"),
    [
        ("max_retries", 1),
        ("backoff_seconds", 1e-9),
        ("multiplier", 1e-9),
        ("max_backoff_seconds", 1e-9),
        ("max_retry_after_seconds", 1e-9),
    ],
)
def test_no_figure_of_a_policy_is_below_zero(field: str, least: float) -> None:
    """Zero is taken, the least below is not; what never ends is no delay; and what is misspelt is refused."""
    assert decide(failed(), FailurePolicy(**{"jitter": False, field: 0}), attempt=9) is not None
    assert getattr(FailurePolicy(**{field: 0}), field) == 0
    with pytest.raises(ValidationError):
        FailurePolicy(**{field: -least})
    with pytest.raises(ValidationError):
        FailurePolicy(**{f"{field}_": 1})
    for wrong in (math.inf, math.nan):
        if field == "max_retry_after_seconds" and wrong == math.inf:
            continue  # Who says so waits as long as a server asks.
        with pytest.raises(ValidationError):
            FailurePolicy(**{field: wrong})


def test_a_policy_is_looked_up_for_a_class() -> None:
    """The node's own, else the run's, else the built-in one."""
    own, mine = FailurePolicy(max_retries=7), FailurePolicy(max_retries=8)
    assert policy_for(RECOVERABLE, {RECOVERABLE: own}, {RECOVERABLE: mine}) is own
    assert policy_for(RECOVERABLE, {TERMINAL: own}, {RECOVERABLE: mine}) is mine
    assert policy_for(RECOVERABLE, None, {RECOVERABLE: mine}) is mine
    assert policy_for(RECOVERABLE, {}, {}) == default_policy_map()[RECOVERABLE]
    assert policy_for(AMBIGUOUS, None, {RECOVERABLE: mine}) == default_policy_map()[AMBIGUOUS]


def test_retries_are_counted_by_run_and_node() -> None:
    """Each count is its own; a budget is used up at its limit."""
    budget, policy = RetryBudget(), FailurePolicy(max_retries=2)
    assert budget.exhausted("run", "node", FailurePolicy(max_retries=1)) is False
    assert budget.exhausted("run", "node", FailurePolicy(max_retries=0)) is True
    assert [
        budget.increment("run", "node"),
        budget.increment("run", "other"),
        budget.increment("x", "node"),
    ] == [1, 1, 1]
    assert budget.exhausted("run", "node", policy) is False
    assert budget.increment("run", "node") == 2
    assert budget.exhausted("run", "node", policy) is True
    assert budget.exhausted("run", "other", policy) is False
    assert budget.increment("run", "node") == 3
    assert budget.exhausted("run", "node", policy) is True


def failed(kind: FailureClass = RECOVERABLE, attempt: int = 1, wait: float | None = None) -> Failure:
    return Failure(ValueError(), kind, "node", attempt, "message", retry_after_seconds=wait)


def steady(**changed: Any) -> FailurePolicy:
    """Ten retries after two seconds each, drawn from nothing."""
    return FailurePolicy(**{"max_retries": 10, "backoff_seconds": 2.0, "jitter": False, **changed})


@pytest.mark.parametrize(
    ("failure", "policy", "attempt", "decision"),
    [
        (failed(TERMINAL), steady(), 1, Stop("a terminal failure is not retried")),
        (failed(AMBIGUOUS), steady(), 1, Retry(2.0)),
        # As many retries as there are.
        (failed(), steady(max_retries=0), 1, Stop("gave up after 1 attempt")),
        (failed(), steady(max_retries=1), 1, Retry(2.0)),
        (failed(attempt=2), steady(max_retries=1), 2, Stop("gave up after 2 attempts")),
        (failed(attempt=9), steady(max_retries=3), 3, Retry(2.0)),
        (failed(attempt=9), steady(max_retries=3), 4, Stop("gave up after 9 attempts")),
        # Delays that grow, up to the longest.
        (failed(), steady(multiplier=3), 1, Retry(2.0)),
        (failed(), steady(multiplier=3), 2, Retry(6.0)),
        (failed(), steady(multiplier=3), 3, Retry(18.0)),
        (failed(), steady(multiplier=3), 5, Retry(60.0)),
        (failed(), steady(multiplier=3, max_backoff_seconds=7), 3, Retry(7.0)),
        (failed(), steady(multiplier=1e300, max_backoff_seconds=7), 9, Retry(7.0)),
        (failed(), steady(multiplier=0), 2, Retry(0.0)),
        # What a server asks for, up to the limit.
        (failed(wait=1.0), steady(), 1, Retry(2.0)),
        (failed(wait=5.0), steady(), 1, Retry(5.0)),
        (failed(wait=120.0), steady(), 1, Retry(120.0)),
        (failed(wait=120.5), steady(), 1, Stop("the server asks to come back in 120.5 s")),
        (failed(wait=0.0), steady(max_retry_after_seconds=0), 1, Retry(2.0)),
        (
            failed(wait=0.1),
            steady(max_retry_after_seconds=0),
            1,
            Stop("the server asks to come back in 0.1 s"),
        ),
        (failed(wait=1234567.0), steady(), 1, Stop("the server asks to come back in 1.23457e+06 s")),
        (failed(wait=1234567.0), steady(max_retry_after_seconds=math.inf), 1, Retry(1234567.0)),
    ],
)
def test_whether_an_attempt_is_followed_by_another(
    failure: Failure, policy: FailurePolicy, attempt: int, decision: Any
) -> None:
    """And after how long, or why not."""
    assert decide(failure, policy, attempt=attempt) == decision


def test_a_delay_is_drawn_from_zero_to_the_computed_one() -> None:
    """Once for each decision, after all limits; a server's wait is never cut short by that."""
    policy = FailurePolicy(max_retries=9, backoff_seconds=4, multiplier=2, max_backoff_seconds=6)
    drawn: list[float] = []

    def draw() -> float:
        drawn.append(0.25)
        return 0.25

    assert decide(failed(), policy, attempt=1, draw=draw) == Retry(1.0)
    assert decide(failed(), policy, attempt=2, draw=draw) == Retry(1.5)
    assert decide(failed(wait=1.25), policy, attempt=1, draw=draw) == Retry(1.25)
    assert len(drawn) == 3
    assert decide(failed(), steady(), attempt=1, draw=draw) == Retry(2.0)
    assert len(drawn) == 3
    delays = [decide(failed(), policy, attempt=1) for _ in range(50)]
    assert all(isinstance(one, Retry) and 0 <= one.delay_seconds < 4 for one in delays)
    assert len(set(delays)) > 1


@pytest.mark.parametrize(
    ("changed", "decision"),
    [
        ({}, Retry(1.0)),
        ({"attempt": 4}, Stop("gave up after 5 attempts")),
        ({"attempt": 4, "repairs": 1}, Retry(1.0)),
        ({"attempt": 5, "repairs": 1}, Stop("gave up after 5 attempts")),
        ({"own": {RECOVERABLE: steady()}}, Retry(2.0)),
        ({"own": {RECOVERABLE: steady(max_retries=0)}}, Stop("gave up after 5 attempts")),
        ({"own": {RECOVERABLE: steady(max_retries=0)}, "repairing": True}, Retry(0.0)),
        ({"repairing": True, "attempt": 99}, Retry(0.0)),
        ({"group": True}, Stop("gave up after 5 attempts")),
        ({"group": True, "repairing": True}, Stop("gave up after 5 attempts")),
        ({"group": True, "own": {}}, Retry(1.0)),
        ({"group": True, "own": {RECOVERABLE: steady()}}, Retry(2.0)),
    ],
)
def test_what_follows_a_failed_attempt(changed: dict[str, Any], decision: Any) -> None:
    """A group is tried again only if asked; attempts that repair an output do not count and begin at once."""
    run = {RECOVERABLE: steady(max_retries=3, backoff_seconds=1.0)}
    requests: dict[str, Any] = {
        "own": None,
        "attempt": 1,
        "group": False,
        "repairing": False,
        "repairs": 0,
        **changed,
    }
    own = requests.pop("own")
    assert follow_up(failed(attempt=5), own, run, **requests) == decision
    if isinstance(decision, Retry):
        jittered = {kind: policy.model_copy(update={"jitter": True}) for kind, policy in run.items()}
        owned = own and {kind: policy.model_copy(update={"jitter": True}) for kind, policy in own.items()}
        half = follow_up(failed(attempt=5), owned, jittered, **requests, draw=lambda: 0.5)
        assert half == Retry(decision.delay_seconds / 2)


def test_a_group_waits_as_its_server_asks() -> None:
    """What stops it says that it is no retry despite a requested wait; a terminal failure says so itself."""
    requests: dict[str, Any] = {"attempt": 1, "group": True, "repairing": False, "repairs": 0}
    assert follow_up(failed(wait=5), None, {}, **requests) == Stop("gave up after 1 attempt")
    assert follow_up(failed(TERMINAL), None, {}, **requests) == Stop("a terminal failure is not retried")


@pytest.mark.core
@pytest.mark.parametrize("kind", [asyncio.CancelledError, GeneratorExit, BaseException, ValueError])
@pytest.mark.parametrize("where", ["__str__", "status_code", "__cause__"])
async def test_an_exception_that_raises_anything_is_a_failure(kind: type[BaseException], where: str) -> None:
    """G2: An exception whose text or attributes raise is a failure of its node like any other."""

    def misbehave(self: object) -> Any:
        raise kind("no")

    members = {where: misbehave if where == "__str__" else property(misbehave)}
    hostile = type("Hostile", (Exception,), members)

    result = await quick(policy_map=NEVER).run([node("a", failing_with(hostile, "words"))], Num())
    assert result.status is RunStatus.PARTIAL
    assert result.failure.failure_class is AMBIGUOUS
    assert result.failure.message == ("Hostile" if where == "__str__" else "words")
