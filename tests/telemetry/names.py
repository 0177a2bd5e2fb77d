"""What is measured: the metrics with their labels, and the values that labels have where these are few."""

VALUES: dict[str, frozenset[str]] = {
    "status": frozenset(
        {"COMPLETED", "FAILED", "PARTIAL", "RESUMED", "CANCELLED", "SUSPENDED", "INTERRUPTED"}
    ),
    "outcome": frozenset({"success", "failure", "cancelled", "suspended"}),
    "failure_class": frozenset({"", "RECOVERABLE", "TERMINAL", "AMBIGUOUS"}),
    "direction": frozenset({"input", "output"}),
    "cache": frozenset({"read", "write"}),
    "dimension": frozenset({"tokens", "cost", "latency"}),
}

NODE = frozenset({"pipeline", "node_id"})

PROMETHEUS: dict[str, tuple[str, frozenset[str]]] = {
    "stroma_runs_total": ("counter", frozenset({"pipeline", "status"})),
    "stroma_runs_in_progress": ("gauge", frozenset({"pipeline"})),
    "stroma_runs_queued": ("gauge", frozenset({"pipeline"})),
    "stroma_runs_oldest_due_seconds": ("gauge", frozenset({"pipeline"})),
    "stroma_runs_blocked": ("gauge", frozenset({"pipeline"})),
    "stroma_runs_oldest_blocked_seconds": ("gauge", frozenset({"pipeline"})),
    "stroma_run_duration_seconds": ("histogram", frozenset({"pipeline", "status"})),
    "stroma_node_duration_seconds": ("histogram", NODE),
    "stroma_node_executions_total": ("counter", NODE | {"outcome", "failure_class", "reason"}),
    "stroma_node_retries_total": ("counter", NODE | {"failure_class"}),
    "stroma_nodes_skipped_total": ("counter", NODE),
    "stroma_tokens_total": ("counter", NODE | {"model", "agent", "direction"}),
    "stroma_cached_tokens_total": ("counter", NODE | {"model", "agent", "cache"}),
    "stroma_cost_usd_total": ("counter", NODE | {"model", "agent", "outcome"}),
    "stroma_budget_warnings_total": ("counter", frozenset({"pipeline", "dimension"})),
    "stroma_budget_exceeded_total": ("counter", frozenset({"pipeline", "dimension"})),
    "stroma_node_waits_total": ("counter", NODE),
    "stroma_circuit_changes_total": ("counter", frozenset({"pipeline", "circuit", "state"})),
    "stroma_limit_cooldowns_total": ("counter", frozenset({"pipeline", "limit"})),
    "stroma_runs_returned_total": ("counter", frozenset({"pipeline", "status"})),
    "stroma_hook_errors_total": ("counter", frozenset({"pipeline", "hook"})),
}

DATADOG: dict[str, tuple[str, frozenset[str]]] = {
    "stroma.runs": ("count", frozenset({"pipeline", "status"})),
    "stroma.run.duration": ("distribution", frozenset({"pipeline", "status"})),
    "stroma.node.duration": ("distribution", NODE),
    "stroma.node.executions": ("count", NODE | {"outcome", "failure_class", "reason"}),
    "stroma.node.retries": ("count", NODE | {"failure_class"}),
    "stroma.tokens": ("count", NODE | {"model", "agent", "direction"}),
    "stroma.cached_tokens": ("count", NODE | {"model", "agent", "cache"}),
    "stroma.cost_usd": ("count", NODE | {"model", "agent", "outcome"}),
    "stroma.nodes.restored": ("count", NODE),
    "stroma.budget.warnings": ("count", frozenset({"pipeline", "dimension"})),
    "stroma.budget.exceeded": ("count", frozenset({"pipeline", "dimension"})),
    "stroma.node.waits": ("count", NODE),
    "stroma.circuit.changes": ("count", frozenset({"pipeline", "circuit", "state"})),
    "stroma.limit.cooldowns": ("count", frozenset({"pipeline", "limit"})),
    "stroma.runs.returned": ("count", frozenset({"pipeline", "status"})),
    "stroma.hook.errors": ("count", frozenset({"pipeline", "hook"})),
}


def labels_of(series: str) -> frozenset[str]:
    """The labels of a series in Prometheus, where a histogram has several; KeyError if nothing writes it."""
    if series in PROMETHEUS:
        kind, labels = PROMETHEUS[series]
        if kind != "histogram":
            return labels
    for suffix, extra in (("_bucket", {"le"}), ("_sum", set()), ("_count", set())):
        base = series.removesuffix(suffix)
        if base != series and PROMETHEUS.get(base, ("",))[0] == "histogram":
            return PROMETHEUS[base][1] | extra
    raise KeyError(series)
