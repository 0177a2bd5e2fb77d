"""Write the page about defaults, with each parameter of the configuration, the runner and the stores, and what its default loses."""

from __future__ import annotations

import inspect
from typing import Any

from docs.reference import NOTE, parameters

__all__ = ["LOSSES", "PAGES", "names_of"]

_PAYLOADS = {
    "codec": "Nothing. Inputs, outputs and answers are stored as plain JSON: anyone who can read the store can read them.",
    "blobs": "Nothing. Large payloads are stored in the rows.",
    "blob_bytes": "Nothing. It applies only with `blobs=`.",
    "plain_until_migrated": "Nothing. With a codec, a plain payload is refused with an error.",
}
_TTL = (
    "A COMPLETED or RESUMED run one hour after its end, with its outputs and the record of its effects. A later `run()` of the id is a "
    "new run and can call an effect again. Pass None, or more than the time in which a request may be repeated. Other runs do not expire."
)

#: What each default loses, by parameter, by name of the class or function.
LOSSES: dict[str, dict[str, str]] = {
    "RunConfig": {
        "run_id": "Nothing. But a repeated request is another run, which is paid again. Pass the id of the order, message or file.",
        "pipeline": "Nothing. `recover()` and workers find runs by this name, so unnamed lists are one pipeline for them.",
        "budget": "Money: no limit stops a run that spends too much.",
        "shared_budgets": "Money: no limit stops several runs that spend too much together.",
        "limits": "Nothing. A call that a provider refuses for its rate is retried by the policy.",
        "node_limits": "Nothing. A node uses the limit named like its id.",
        "breaker": "Nothing. Each run finds out by itself that a provider is down.",
        "policy_map": "The price of the attempts that failed: up to 3 retries after a RECOVERABLE failure, 1 after an AMBIGUOUS one.",
        "node_policies": "Nothing. A group is not retried as a whole; a resume calls only its unfinished children.",
        "hooks": "Nothing. Failures are in the log, the result and the store.",
        "classifiers": "Nothing. The built-in rules classify failures.",
        "context": "The changes that nodes make in it: it is not stored, so a resume in another process starts without them.",
        "node_timeouts": "Time: a function that never returns is waited for.",
        "max_threads": "Nothing. Plain functions beyond this number wait for a thread.",
        "contract_retries": "The price of an answer that broke its contract: the run is FAILED. Outputs before it are stored, for a resume.",
        "resume_from": "Nothing.",
        "resume": "Nothing. `if_exists` decides.",
        "retry_failed_items": "Nothing. Failed items of maps stay failed on a resume.",
        "if_exists": (
            "The outputs of an execution that has ended: a new one calls its nodes again and pays again, also after FAILED, PARTIAL or "
            "CANCELLED. Pass `resume=True` to keep them. Nothing of an execution that has not ended, and no recorded effect: `RunExists`."
        ),
        "if_running": "Nothing. A second call is `RunBusy`.",
        "max_recoveries": "Nothing. A run whose process died 5 times is FAILED with its outputs stored; `force_resume=True` continues it.",
        "force_resume": "Nothing.",
        "allow_changes": "Nothing. A changed pipeline is `PipelineChanged` before anything is called.",
        "check": "The price of the nodes before one that cannot accept their output. `stroma check` finds it before a deploy.",
        "on_budget": "Nothing. The run is PARTIAL with its outputs stored; raise the limit and resume it.",
        "lease_seconds": "Time: on another machine, a run without its owner is taken over after up to 30 s.",
        "inline_wait_seconds": "Nothing. A flow that waits longer is SUSPENDED until a worker or a resume continues it.",
        "model_fallbacks": "Nothing. The model stays the same until the budget is used up.",
        "unknown_model": (
            "Without a cost limit, the price of an unknown model: it counts as 0 USD, is logged, and appears in "
            "`result.unpriced_models`. Under a cost limit the run stops."
        ),
        "hook_errors": "The exception of a hook: it is logged and appears in `result.hook_errors`; the run continues.",
        "hook_delivery": "The end hooks of an attempt whose process died between its commit and the call of the hook.",
        "hook_timeout_ms": "The work of a hook after 5 s: the hook is cancelled, and logged.",
        "tags": "Nothing.",
        "conversation": "Nothing.",
        "user": "Nothing.",
        "redact": "Privacy: your hooks, log lines and pages receive states as they are, apart from masked secrets.",
        "events": "The text and progress that nodes emit, and the view of a run from another process: `follow()` has its suspensions and its end only.",
        "keep_rejected": "The part beyond 64 KiB of an output that broke its contract, and its secrets. The rest is stored, for repair and debugging.",
    },
    "StromaRunner.quick": {
        "store": "Everything at the end of the process: runs are in memory. Pass a path or URL to keep them.",
        "budget": "Money: as `RunConfig.budget`.",
        "policy_map": "As `RunConfig.policy_map`.",
        "classifiers": "Nothing.",
        "hooks": "Nothing. As `RunConfig.hooks`.",
        "config": "As the fields of `RunConfig` above.",
    },
    "InMemoryStore": {},
    "AsyncInMemoryStore": {},
    "SQLiteStore": {
        "path": "It has no default.",
        "synchronous": 'Nothing: an acknowledged commit survives a power cut. `"normal"` may lose the last commits.',
        **_PAYLOADS,
    },
    "PostgresStore": {
        "dsn": "It has no default.",
        "schema": "Nothing. Two programs with the same database and schema share their runs.",
        **_PAYLOADS,
    },
    "RedisStore": {"redis_url": "It has no default.", "ttl_seconds": _TTL, **_PAYLOADS},
    "SyncRedisStore": {
        "redis_url": "It has no default.",
        "ttl_seconds": _TTL,
        "options": "As `RedisStore`.",
    },
}


def _documented(name: str) -> Any:
    """Return the class or function of a section."""
    import stroma

    value: Any = stroma
    for part in name.split("."):
        value = getattr(value, part)
    return value


def defaults_page() -> str:
    lines = [
        NOTE,
        "",
        "# Defaults",
        "",
        "This page states for each default what it loses, for anyone who decides which parameters to pass. No default loses finished work of a run that has not ended, "
        "an answer, or the record of a call that must not be repeated, unless this page says so.",
        "",
    ]
    for name, losses in LOSSES.items():
        lines += [f"## {name}", ""]
        if not losses:
            lines += ["It has no parameters. Its runs end with the process.", ""]
            continue
        missing = sorted(names_of(name) - set(losses))
        if missing:
            raise ValueError(
                f"LOSSES in docs/defaults.py has no {', '.join(missing)} of {name}; add what its default loses"
            )
        lines += ["| parameter | default | what this default loses |", "| --- | --- | --- |"]
        lines += [
            f"| `{one.name}` | {one.default or 'none'} | {losses[one.name]} |"
            for one in parameters(_documented(name))
        ]
        lines.append("")
    return "\n".join(lines)


def names_of(name: str) -> set[str]:
    """Return the parameters that a section must have."""
    value = _documented(name)
    return set(getattr(value, "model_fields", None) or inspect.signature(value).parameters)


PAGES = {"reference/defaults.md": defaults_page}
