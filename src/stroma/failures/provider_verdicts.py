"""Meanings of providers' errors: tables by status, code, phrase and class name. Read by ``providers.py``.

A new reason goes into one of these tables: by status, code or phrase. A row of ``NAMES`` counts for the
packages in ``CLIENTS`` only. Waits that are not in headers are read in ``providers.py``.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

ClassName = Literal["RECOVERABLE", "TERMINAL", "AMBIGUOUS"]


class ProviderVerdict(NamedTuple):
    """Meaning of a provider error: a class, a stable reason, and the seconds that the server asks to wait.

    The reason is None for a group with an exception of unknown shape.
    """

    failure_class: ClassName
    reason: str | None
    retry_after: float | None = None


BAD_REQUEST: Final = ProviderVerdict("TERMINAL", "bad_request")
AUTH: Final = ProviderVerdict("TERMINAL", "auth")
PERMISSION: Final = ProviderVerdict("TERMINAL", "permission")
QUOTA: Final = ProviderVerdict("TERMINAL", "quota")
NOT_FOUND: Final = ProviderVerdict("TERMINAL", "not_found")
TOO_LARGE: Final = ProviderVerdict("TERMINAL", "too_large")
CONTEXT: Final = ProviderVerdict("TERMINAL", "context_length")
CONTENT: Final = ProviderVerdict("TERMINAL", "content_policy")
TIMEOUT: Final = ProviderVerdict("RECOVERABLE", "timeout")
CONNECTION: Final = ProviderVerdict("RECOVERABLE", "connection")
CONFLICT: Final = ProviderVerdict("RECOVERABLE", "conflict")
RATE_LIMIT: Final = ProviderVerdict("RECOVERABLE", "rate_limit")
OVERLOADED: Final = ProviderVerdict("RECOVERABLE", "overloaded")
SERVER: Final = ProviderVerdict("RECOVERABLE", "server_error")

STATUS: Final[dict[int, ProviderVerdict]] = {
    400: BAD_REQUEST,
    401: AUTH,
    402: QUOTA,
    403: PERMISSION,
    404: NOT_FOUND,
    408: TIMEOUT,
    409: CONFLICT,
    413: TOO_LARGE,
    422: BAD_REQUEST,
    425: ProviderVerdict("RECOVERABLE", "too_early"),
    429: RATE_LIMIT,
    503: OVERLOADED,
    504: TIMEOUT,
    529: OVERLOADED,
}
#: Codes and types in the body that say more than the status does, whichever that is.
CODES: Final[dict[str, ProviderVerdict]] = {
    "insufficient_quota": QUOTA,
    "billing_hard_limit_reached": QUOTA,
    "billing_error": QUOTA,
    "contract_spend_limit_reached": QUOTA,
    "enforced_spend_limit_reached": QUOTA,
    "linked_organization_spend_limit_reached": QUOTA,
    "ServiceQuotaExceededException": QUOTA,
    "context_length_exceeded": CONTEXT,
    "string_above_max_length": CONTEXT,
    "content_filter": CONTENT,
    "content_policy_violation": CONTENT,
    "moderation_blocked": CONTENT,
    "overloaded_error": OVERLOADED,
    # Google's ErrorInfo, beside a 400 or 403.
    "API_KEY_INVALID": AUTH,
    "BILLING_DISABLED": QUOTA,
    "PerDay": QUOTA,  # A quota of the day that is used up: see _codes.
    # AWS: a key that is wrong or out of date has 400 or 403, a model that failed 424.
    "ExpiredTokenException": AUTH,
    "InvalidSignatureException": AUTH,
    "UnrecognizedClientException": AUTH,
    "ModelErrorException": SERVER,
    "ModelNotReadyException": OVERLOADED,
    # Some of AWS's services say these with status 400.
    "Throttling": RATE_LIMIT,
    "ThrottlingException": RATE_LIMIT,
    "TooManyRequestsException": RATE_LIMIT,
}
#: Those that only matter where there is no status that says something: an error inside a stream that began
#: with 200.
STREAMED: Final[dict[str, ProviderVerdict]] = {
    "rate_limit_error": RATE_LIMIT,
    "rate_limit_exceeded": RATE_LIMIT,
    "server_error": SERVER,
    "api_error": SERVER,
    "timeout_error": TIMEOUT,
    "conflict_error": CONFLICT,
    "invalid_api_key": AUTH,
    "authentication_error": AUTH,
    "permission_error": PERMISSION,
    "not_found_error": NOT_FOUND,
    "request_too_large": TOO_LARGE,
    "invalid_request_error": BAD_REQUEST,
    # AWS
    "throttlingException": RATE_LIMIT,
    "serviceUnavailableException": OVERLOADED,
    "internalServerException": SERVER,
    "modelStreamErrorException": SERVER,
    "modelTimeoutException": TIMEOUT,
    "validationException": BAD_REQUEST,
}
#: Statuses that mean something of their own at one provider.
OWN: Final[dict[tuple[str, int], ProviderVerdict]] = {("cohere", 498): CONTENT}  # a token of its deny-list
#: What a bad request is about where only its prose tells. It is TERMINAL either way: new words cost a good
#: reason, never the class.
PHRASES: Final[tuple[tuple[str, ProviderVerdict], ...]] = (
    ("prompt is too long", CONTEXT),
    ("input is too long", CONTEXT),
    ("context length", CONTEXT),
    ("context limit", CONTEXT),
    ("context window", CONTEXT),
    ("too many tokens", CONTEXT),
    ("maximum number of tokens", CONTEXT),
    ("content filtering policy", CONTENT),
    ("content management policy", CONTENT),
    ("content policy", CONTENT),
    ("credit balance is too low", QUOTA),
)
#: The same for a rate limit that no wait of ours outlasts.
LASTING: Final[tuple[tuple[str, ProviderVerdict], ...]] = (
    ("api calls / month", QUOTA),
    ("tokens must be reduced", TOO_LARGE),  # OpenAI: one request is more than the limit of a minute.
)
#: And for what gRPC's client says of its own under a status that a server gives too.
GRPC_PHRASES: Final[tuple[tuple[str, ProviderVerdict], ...]] = (
    ("message larger than max", TOO_LARGE),
    ("failed to connect", CONNECTION),
    ("errors resolving", CONNECTION),
    ("dns resolution failed", CONNECTION),
    ("connection reset", CONNECTION),
    ("socket closed", CONNECTION),
)
#: The statuses of gRPC, as Google's HTTP interfaces translate them.
GRPC: Final = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "UNIMPLEMENTED": 404,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNKNOWN": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
#: Without a status: the names of an exception's bases that come from a client's package. The first match
#: counts.
CLIENTS: Final = frozenset(
    {
        "aiohttp",
        "anthropic",
        "botocore",
        "cohere",
        "google",
        "httpcore",
        "httpcore2",
        "httpx",
        "httpx2",
        "mistralai",
        "openai",
        "requests",
        "urllib3",
    }
)
NAMES: Final[tuple[tuple[frozenset[str], ProviderVerdict], ...]] = (
    # Subclasses of transport errors that no second try fixes.
    (
        frozenset(
            {
                "UnsupportedProtocol",
                "LocalProtocolError",
                "InvalidURL",
                "MissingSchema",
                "InvalidSchema",
                "NoRegionError",
                "ParamValidationError",
            }
        ),
        BAD_REQUEST,
    ),
    (frozenset({"DefaultCredentialsError", "NoCredentialsError", "PartialCredentialsError"}), AUTH),
    (frozenset({"ContentFilterFinishReasonError"}), CONTENT),
    (
        frozenset(
            {
                "APITimeoutError",
                "TimeoutException",
                "Timeout",
                "ReadTimeout",
                "ConnectTimeout",
                "ReadTimeoutError",
                "ConnectTimeoutError",
                "ServerTimeoutError",
            }
        ),
        TIMEOUT,
    ),
    (
        frozenset(
            {
                "APIConnectionError",
                "TransportError",
                "NetworkError",
                "RemoteProtocolError",
                "ConnectionError",
                "ClientConnectionError",
                "ClientPayloadError",
                "ChunkedEncodingError",
                "ConnectionClosedError",
                "IncompleteReadError",
                "NoResponseError",
                "ResponseStreamingError",
            }
        ),
        CONNECTION,
    ),
)
