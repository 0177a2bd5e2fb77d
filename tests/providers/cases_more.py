"""What Google, Mistral, Cohere, AWS, requests, aiohttp and gRPC do: see `cases.py`."""

import json
import re
from typing import Any

from tests.providers.cases import VLLM, A, Case, R, T, transport
from tests.providers.clients import aws_event
from tests.providers.server import Answer

from stroma import FailureClass


def by_google(status: int, word: str = "", message: str = "no", *details: dict[str, Any]) -> Answer:
    error = {"code": status, "message": message, "status": word or "UNKNOWN", "details": list(details)}
    return Answer(status, {"error": error})


def streamed_by_google(status: int, word: str) -> Answer:
    error = {"error": {"code": status, "message": "no", "status": word}}
    return Answer(body=f"data: {json.dumps(error)}\n\n")


def by_mistral(status: int, code: str = "1000", message: str = "no") -> Answer:
    body = {"object": "error", "message": message, "type": "invalid_request", "param": None, "code": code}
    return Answer(status, body)


def by_cohere(status: int, message: str = "no") -> Answer:
    return Answer(status, {"id": "1", "message": message})


def by_aws(status: int, code: str, message: str = "no") -> Answer:
    return Answer(status, {"message": message}, {"x-amzn-errortype": code})


def _kind(name: str) -> dict[str, str]:
    return {"@type": f"type.googleapis.com/google.rpc.{name}"}


def _reason(reason: str) -> dict[str, Any]:
    return {**_kind("ErrorInfo"), "reason": reason, "domain": "googleapis.com"}


def _quota(quota: str) -> dict[str, Any]:
    return {**_kind("QuotaFailure"), "violations": [{"quotaId": quota, "quotaValue": "20"}]}


_DELAY = {**_kind("RetryInfo"), "retryDelay": "34.074824224s"}
_TOO_MANY = "The input token count (1048577) exceeds the maximum number of tokens allowed (1048576)."
_TRIAL = "You are using a Trial key, which is limited to 1000 API calls / month."
_DENIED = "too many tokens: the request has 300000 tokens, the limit is 256000"


def _google(
    what: str,
    failure_class: FailureClass,
    reason: str | None,
    *details: Any,
    message: str = "no",
    delay: float | None = None,
) -> Case:
    """Return a case whose answer has the status, or the stream, and the word of ``what``, and details."""
    number, word = re.findall(r"(\d+)(?: `(\w+)`)?", what)[0]
    status, is_stream = int(number), what.startswith("stream")
    answer = streamed_by_google(status, word) if is_stream else by_google(status, word, message, *details)
    raised = "ClientError" if status < 500 else "ServerError"
    return Case("google-genai", what, answer, raised, failure_class, reason, delay)


def _aws(
    what: str, raised: str, failure_class: FailureClass, reason: str, answer: Answer | None = None
) -> Case:
    """Return a case; without an answer it is the one that ``what`` says."""
    if answer is None:
        status, _, code = what.partition(" ")
        answer = by_aws(int(status), code.strip("`") or "Other")
    return Case("botocore", what, answer, raised, failure_class, reason)


_HTTPX = ("ConnectError", "ReadError", "RemoteProtocolError", "ReadTimeout")
#: Where an SDK makes nothing special of a status.
_STATUSES: list[tuple[int, FailureClass, str]] = [
    (400, T, "bad_request"),
    (401, T, "auth"),
    (402, T, "quota"),
    (403, T, "permission"),
    (404, T, "not_found"),
    (408, R, "timeout"),
    (409, R, "conflict"),
    (413, T, "too_large"),
    (422, T, "bad_request"),
    (425, R, "too_early"),
    (429, R, "rate_limit"),
    (500, R, "server_error"),
    (502, R, "server_error"),
    (503, R, "overloaded"),
    (504, R, "timeout"),
    (529, R, "overloaded"),
]
_MISTRAL = {422: "HTTPValidationError"}
_COHERE = {
    400: "BadRequestError",
    401: "UnauthorizedError",
    403: "ForbiddenError",
    404: "NotFoundError",
    422: "UnprocessableEntityError",
    429: "TooManyRequestsError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}

MORE_CASES = [
    *[_google(str(status), means, why) for status, means, why in _STATUSES],
    _google("400 `INVALID_ARGUMENT`, “maximum number of tokens”", T, "context_length", message=_TOO_MANY),
    _google(
        "400 `INVALID_ARGUMENT`, `API_KEY_INVALID`",
        T,
        "auth",
        _reason("API_KEY_INVALID"),
        message="API key not valid.",
    ),
    _google("403 `PERMISSION_DENIED`, `BILLING_DISABLED`", T, "quota", _reason("BILLING_DISABLED")),
    _google(
        "429 `RESOURCE_EXHAUSTED`, `retryDelay` 34.07 s",
        R,
        "rate_limit",
        _quota("GenerateRequestsPerMinutePerProjectPerModel"),
        _DELAY,
        delay=34.074824224,
    ),
    _google(
        "429 `RESOURCE_EXHAUSTED`, a quota `PerDay`",
        T,
        "quota",
        _quota("GenerateRequestsPerDayPerProjectPerModel-FreeTier"),
    ),
    _google("499 `CANCELLED`", A, None),
    _google("stream with 503 `UNAVAILABLE`", R, "overloaded"),
    _google("stream with 429 `RESOURCE_EXHAUSTED`", R, "rate_limit"),
    Case("google-genai", "no JSON", Answer(body="no json"), "UnknownApiResponseError", A, None),
    *transport("google-genai", *_HTTPX),
    *[
        Case("mistralai", str(status), by_mistral(status), _MISTRAL.get(status, "SDKError"), means, why)
        for status, means, why in _STATUSES
    ],
    Case(
        "mistralai",
        "400 “maximum context length”",
        by_mistral(400, "3051", VLLM),
        "SDKError",
        T,
        "context_length",
    ),
    Case("mistralai", "an answer of another shape", Answer(body={}), "ResponseValidationError", A, None),
    *transport("mistralai", *_HTTPX),
    *[
        Case("cohere", str(status), by_cohere(status), _COHERE.get(status, "ApiError"), means, why)
        for status, means, why in _STATUSES
    ],
    Case("cohere", "400 “too many tokens”", by_cohere(400, _DENIED), "BadRequestError", T, "context_length"),
    Case("cohere", "429 “API calls / month”", by_cohere(429, _TRIAL), "TooManyRequestsError", T, "quota"),
    Case("cohere", "498", by_cohere(498), "InvalidTokenError", T, "content_policy"),
    Case("cohere", "499", by_cohere(499), "ClientClosedRequestError", A, None),
    *transport("cohere", *_HTTPX),
    _aws("400 `ValidationException`", "ValidationException", T, "bad_request"),
    _aws(
        "400 `ValidationException`, “Input is too long”",
        "ValidationException",
        T,
        "context_length",
        by_aws(400, "ValidationException", "Input is too long for requested model."),
    ),
    _aws("400 `ServiceQuotaExceededException`", "ServiceQuotaExceededException", T, "quota"),
    _aws("401", "ClientError", T, "auth"),
    _aws("403 `AccessDeniedException`", "AccessDeniedException", T, "permission"),
    _aws("403 `ExpiredTokenException`", "ClientError", T, "auth"),
    _aws("403 `UnrecognizedClientException`", "ClientError", T, "auth"),
    _aws("403 `InvalidSignatureException`", "ClientError", T, "auth"),
    _aws("404 `ResourceNotFoundException`", "ResourceNotFoundException", T, "not_found"),
    _aws("408 `ModelTimeoutException`", "ModelTimeoutException", R, "timeout"),
    _aws("409", "ConflictException", R, "conflict", by_aws(409, "ConflictException")),
    _aws("413", "ClientError", T, "too_large"),
    _aws("422", "ClientError", T, "bad_request"),
    _aws("424 `ModelErrorException`", "ModelErrorException", R, "server_error"),
    _aws("429 `ThrottlingException`", "ThrottlingException", R, "rate_limit"),
    _aws("400 `ThrottlingException`", "ThrottlingException", R, "rate_limit"),
    _aws("429 `ModelNotReadyException`", "ModelNotReadyException", R, "overloaded"),
    _aws("500 `InternalServerException`", "InternalServerException", R, "server_error"),
    _aws("502", "ClientError", R, "server_error"),
    _aws("503 `ServiceUnavailableException`", "ServiceUnavailableException", R, "overloaded"),
    _aws("529", "ClientError", R, "overloaded"),
    *[
        Case(
            "botocore", f"stream with `{kind}`", Answer(body=aws_event(kind)), "EventStreamError", means, why
        )
        for kind, means, why in (
            ("throttlingException", R, "rate_limit"),
            ("serviceUnavailableException", R, "overloaded"),
            ("internalServerException", R, "server_error"),
            ("modelStreamErrorException", R, "server_error"),
            ("validationException", T, "bad_request"),
        )
    ],
    *transport("botocore", "EndpointConnectionError", "ConnectionClosedError", None, "ReadTimeoutError"),
    *[
        Case("requests", str(status), Answer(status, {}), "HTTPError", means, why)
        for status, means, why in _STATUSES
    ],
    *transport("requests", "ConnectionError", "ConnectionError", "ChunkedEncodingError", "ReadTimeout"),
    *[
        Case("aiohttp", str(status), Answer(status, {}), "ClientResponseError", means, why)
        for status, means, why in _STATUSES
    ],
    *transport(
        "aiohttp", "ClientConnectorError", "ClientOSError", "ClientPayloadError", "SocketTimeoutError"
    ),
]

#: What a gRPC server does, by the name of the method that is asked for, or to the call; and what it means.
GRPC_CASES: list[tuple[str, FailureClass, str | None]] = [
    ("CANCELLED", A, None),
    ("UNKNOWN", R, "server_error"),
    ("INVALID_ARGUMENT", T, "bad_request"),
    ("DEADLINE_EXCEEDED", R, "timeout"),
    ("NOT_FOUND", T, "not_found"),
    ("ALREADY_EXISTS", A, None),
    ("PERMISSION_DENIED", T, "permission"),
    ("RESOURCE_EXHAUSTED", R, "rate_limit"),
    ("FAILED_PRECONDITION", T, "bad_request"),
    ("ABORTED", R, "conflict"),
    ("OUT_OF_RANGE", T, "bad_request"),
    ("UNIMPLEMENTED", T, "not_found"),
    ("INTERNAL", R, "server_error"),
    ("UNAVAILABLE", R, "overloaded"),
    ("DATA_LOSS", A, None),
    ("UNAUTHENTICATED", T, "auth"),
    ("the server's code raises", R, "server_error"),
    ("an answer that is too large", T, "too_large"),
    ("connection refused", R, "connection"),
    ("connection dropped", R, "connection"),
    ("no answer in time", R, "timeout"),
]
