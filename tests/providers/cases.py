"""What providers do, and what it means: the cases of the tests, and the tables of `docs/providers.md`.

After a change here run `./dev run python docs/generate.py`.
"""

import json
from dataclasses import dataclass
from typing import Any

from tests.providers.server import Answer

from stroma import FailureClass

R, T, A = FailureClass.RECOVERABLE, FailureClass.TERMINAL, FailureClass.AMBIGUOUS


@dataclass(frozen=True)
class Case:
    """One thing that a provider does, and what it means."""

    sdk: str
    what: str
    answer: Answer
    raised: str  # the name of the SDK's exception
    failure_class: FailureClass
    reason: str | None
    delay: float | None = None  # seconds that the server asks to wait

    def __str__(self) -> str:
        return f"{self.sdk}: {self.what}"


def by_openai(
    status: int, code: str | None = None, message: str = "no", kind: str = "invalid_request_error"
) -> Answer:
    return Answer(status, {"error": {"message": message, "type": kind, "param": None, "code": code}})


def by_anthropic(status: int, kind: str, message: str = "no", error_code: str | None = None) -> Answer:
    error = {"type": kind, "message": message}
    details = {"details": {"error_code": error_code}} if error_code else {}
    return Answer(status, {"type": "error", "error": error | details, "request_id": "req_1"})


def streamed_by_openai(kind: str, code: str | None = None) -> Answer:
    error = {"error": {"message": "no", "type": kind, "param": None, "code": code}}
    return Answer(body=f"data: {json.dumps(error)}\n\n")


def streamed_by_anthropic(kind: str) -> Answer:
    error = {"type": "error", "error": {"type": kind, "message": "no"}}
    return Answer(body=f"event: error\ndata: {json.dumps(error)}\n\n")


def _openai(what: str, raised: str, failure_class: FailureClass, reason: str, **body: Any) -> Case:
    """Return a case whose answer has the status, or the stream, and the code of ``what``, and this body."""
    status, _, code = what.partition(" ")
    code = code.removeprefix("with ").strip("`")
    if status == "stream":
        answer = streamed_by_openai(body.get("kind", code), body.get("code"))
    else:
        answer = by_openai(int(status), **{"code": None if "“" in code else code or None, **body})
    return Case("openai", what, answer, raised, failure_class, reason)


def _anthropic(what: str, raised: str, failure_class: FailureClass, reason: str, **body: Any) -> Case:
    """Return a case whose answer has the status, or the stream, and the kind of ``what``, and this body."""
    status, _, kind = what.partition(" ")
    kind = kind.removeprefix("with ").partition(",")[0].strip("`") or "api_error"
    if status == "stream":
        answer = streamed_by_anthropic(kind)
    else:
        answer = by_anthropic(int(status), "invalid_request_error" if "“" in kind else kind, **body)
    return Case("anthropic", what, answer, raised, failure_class, reason)


def transport(sdk: str, refused: str, dropped: str, cut: str | None, late: str) -> list[Case]:
    """Return the cases of a connection that fails; ``cut``: None if the SDK takes such an answer."""
    faults = [
        ("connection refused", Answer(fault="refuse"), refused, "connection"),
        ("connection dropped", Answer(fault="drop"), dropped, "connection"),
        ("answer cut short", Answer(body={}, fault="cut"), cut, "connection"),
        ("no answer in time", Answer(fault="hang"), late, "timeout"),
    ]
    return [Case(sdk, what, answer, raised, R, why) for what, answer, raised, why in faults if raised]


TOO_LONG = "prompt is too long: 208310 tokens > 200000 maximum"
OVER_LIMIT = "input length and `max_tokens` exceed context limit: 199000 + 4096 > 200000"
BLOCKED = "Output blocked by content filtering policy"
CREDIT = "Your credit balance is too low to access the Anthropic API."
VLLM = "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens."

PROVIDER_CASES = [
    _openai("400", "BadRequestError", T, "bad_request"),
    _openai("400 `context_length_exceeded`", "BadRequestError", T, "context_length"),
    _openai("400 `string_above_max_length`", "BadRequestError", T, "context_length"),
    _openai("400 “maximum context length”", "BadRequestError", T, "context_length", message=VLLM),
    _openai("400 `content_policy_violation`", "BadRequestError", T, "content_policy"),
    _openai("400 `content_filter`", "BadRequestError", T, "content_policy"),
    _openai("400 `moderation_blocked`", "BadRequestError", T, "content_policy"),
    _openai("400 `billing_hard_limit_reached`", "BadRequestError", T, "quota"),
    _openai("401 `invalid_api_key`", "AuthenticationError", T, "auth"),
    _openai("403", "PermissionDeniedError", T, "permission", code="unsupported_country_region_territory"),
    _openai("404 `model_not_found`", "NotFoundError", T, "not_found"),
    _openai("408", "APIStatusError", R, "timeout"),
    _openai("409", "ConflictError", R, "conflict"),
    _openai("413", "APIStatusError", T, "too_large"),
    _openai("413 `rate_limit_exceeded`", "APIStatusError", T, "too_large"),
    _openai("422", "UnprocessableEntityError", T, "bad_request"),
    _openai("425", "APIStatusError", R, "too_early"),
    _openai("429 `rate_limit_exceeded`", "RateLimitError", R, "rate_limit", kind="tokens"),
    _openai("429 `insufficient_quota`", "RateLimitError", T, "quota", kind="insufficient_quota"),
    _openai("500", "InternalServerError", R, "server_error", kind="server_error"),
    _openai("502", "InternalServerError", R, "server_error"),
    _openai("503", "InternalServerError", R, "overloaded", message="The engine is currently overloaded"),
    _openai("504", "InternalServerError", R, "timeout"),
    _openai("529", "InternalServerError", R, "overloaded"),
    _openai("stream with `server_error`", "APIError", R, "server_error"),
    _openai(
        "stream with `rate_limit_exceeded`",
        "APIError",
        R,
        "rate_limit",
        kind="requests",
        code="rate_limit_exceeded",
    ),
    _openai("stream with `insufficient_quota`", "APIError", T, "quota", kind="x", code="insufficient_quota"),
    _openai(
        "stream with `invalid_api_key`",
        "APIError",
        T,
        "auth",
        kind="invalid_request_error",
        code="invalid_api_key",
    ),
    _openai("stream with `invalid_request_error`", "APIError", T, "bad_request"),
    *transport("openai", "APIConnectionError", "APIConnectionError", "APIConnectionError", "APITimeoutError"),
    _anthropic("400 `invalid_request_error`", "BadRequestError", T, "bad_request"),
    _anthropic("400 “prompt is too long”", "BadRequestError", T, "context_length", message=TOO_LONG),
    _anthropic("400 “exceed context limit”", "BadRequestError", T, "context_length", message=OVER_LIMIT),
    _anthropic("400 “content filtering policy”", "BadRequestError", T, "content_policy", message=BLOCKED),
    _anthropic("400 “credit balance is too low”", "BadRequestError", T, "quota", message=CREDIT),
    _anthropic("400 `overloaded_error`", "BadRequestError", R, "overloaded"),
    _anthropic("401 `authentication_error`", "AuthenticationError", T, "auth"),
    _anthropic("402 `billing_error`", "PaymentRequiredError", T, "quota"),
    _anthropic("403 `permission_error`", "PermissionDeniedError", T, "permission"),
    _anthropic("403 `billing_error`", "PermissionDeniedError", T, "quota"),
    _anthropic("404 `not_found_error`", "NotFoundError", T, "not_found"),
    _anthropic("408 `timeout_error`", "RequestTimeoutError", R, "timeout"),
    _anthropic("409 `conflict_error`", "ConflictError", R, "conflict"),
    _anthropic("413 `request_too_large`", "ContentTooLargeError", T, "too_large"),
    _anthropic("422 `invalid_request_error`", "UnprocessableEntityError", T, "bad_request"),
    _anthropic("429 `rate_limit_error`", "RateLimitError", R, "rate_limit"),
    _anthropic(
        "429 `rate_limit_error`, `enforced_spend_limit_reached`",
        "EnforcedSpendLimitReachedError",
        T,
        "quota",
        error_code="enforced_spend_limit_reached",
    ),
    _anthropic(
        "429 `rate_limit_error`, `contract_spend_limit_reached`",
        "ContractSpendLimitReachedError",
        T,
        "quota",
        error_code="contract_spend_limit_reached",
    ),
    _anthropic(
        "429 `rate_limit_error`, `ramp_limit_exceeded`",
        "RampLimitExceededError",
        R,
        "rate_limit",
        error_code="ramp_limit_exceeded",
    ),
    _anthropic("500 `api_error`", "InternalServerError", R, "server_error"),
    _anthropic("500 `overloaded_error`", "InternalServerError", R, "overloaded"),
    _anthropic("502", "InternalServerError", R, "server_error"),
    _anthropic("503", "ServiceUnavailableError", R, "overloaded"),
    _anthropic("504 `timeout_error`", "GatewayTimeoutError", R, "timeout"),
    _anthropic("529 `overloaded_error`", "OverloadedError", R, "overloaded"),
    _anthropic("stream with `overloaded_error`", "APIStatusError", R, "overloaded"),
    _anthropic("stream with `api_error`", "APIStatusError", R, "server_error"),
    _anthropic("stream with `rate_limit_error`", "APIStatusError", R, "rate_limit"),
    _anthropic("stream with `timeout_error`", "APIStatusError", R, "timeout"),
    _anthropic("stream with `conflict_error`", "APIStatusError", R, "conflict"),
    _anthropic("stream with `authentication_error`", "APIStatusError", T, "auth"),
    _anthropic("stream with `permission_error`", "APIStatusError", T, "permission"),
    _anthropic("stream with `not_found_error`", "APIStatusError", T, "not_found"),
    _anthropic("stream with `request_too_large`", "APIStatusError", T, "too_large"),
    _anthropic("stream with `invalid_request_error`", "APIStatusError", T, "bad_request"),
    *transport(
        "anthropic", "APIConnectionError", "APIConnectionError", "APIConnectionError", "APITimeoutError"
    ),
]
