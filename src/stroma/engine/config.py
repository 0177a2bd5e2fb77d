"""RunConfig: the settings of a run, time limits of nodes among them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Final, Generic, Literal, Self, TypeAlias, TypedDict, cast

from pydantic import ConfigDict, Field, SkipValidation, ValidationInfo, field_validator

from stroma._utils.forks import call_in_child
from stroma._utils.models import StrictModel
from stroma.contracts.contract import check_id
from stroma.contracts.copying import construct, replicate
from stroma.contracts.node import DepsT
from stroma.cost.budget import LARGEST, ExecutionBudget
from stroma.cost.fallback import FallbackPolicy
from stroma.cost.usage import shown
from stroma.failures.failure import Classifier
from stroma.failures.policy import FailurePolicy, PolicyMap, default_policy_map
from stroma.hooks.sets import AnyHooks, NodeHooks, check_plain, flatten

if TYPE_CHECKING:
    from typing import Unpack

    from stroma.limits.breaker import Breaker
    from stroma.limits.rate_limit import Limit
    from stroma.limits.shared_budget import SharedBudget
else:  # Loaded by who makes one: pydantic leaves them to the validators below.
    Breaker = Limit = SharedBudget = Any
from pydantic import model_validator


class NodeTimeout(StrictModel):
    """The time limits of a node, or of a group, for an entry of ``node_timeouts``; at least one of them.

    Attributes:
        total_ms: limit in milliseconds of the function as a whole; a plain number is the same.
        idle_ms: limit in milliseconds of the time without an event. Each ``current_node().emit(...)`` renews
            it; that of a group is renewed by every node inside.
    """

    model_config = ConfigDict(frozen=True)

    total_ms: int | None = Field(default=None, gt=0, le=LARGEST)
    idle_ms: int | None = Field(default=None, gt=0, le=LARGEST)

    @model_validator(mode="after")
    def _has_a_limit(self) -> Self:
        if self.total_ms is None and self.idle_ms is None:
            raise ValueError("NodeTimeout has no limit; pass total_ms or idle_ms")
        return self


def limits_ms(limit: int | NodeTimeout | None) -> tuple[int | None, int | None]:
    """Return the total and idle limit in milliseconds of an entry of ``node_timeouts``, or None."""
    return (limit.total_ms, limit.idle_ms) if isinstance(limit, NodeTimeout) else (limit, None)


_LONGEST_LABEL: Final = 200  # An index holds them.


def new_run_id() -> str:
    """Return a fresh id: 32 hexadecimal digits."""
    return os.urandom(16).hex()


class _GeneratedId(str):
    """An id that names one run. Copies of a config share the mark, so that no two runs take it."""

    #: Stands for this process: a forked process must generate separate ids.
    process = object()
    fresh_in: object

    def __deepcopy__(self, memo: object) -> Self:
        return self  # A deep copy of a config shares the mark too.


@call_in_child
def _be_another_process() -> None:
    _GeneratedId.process = object()


def check_label(text: str, what: str) -> str:
    """Return a text that stores keep as a label. Raises ValueError or TypeError for another one."""
    if len(check_id(text, what)) > _LONGEST_LABEL:
        raise ValueError(
            f"a {what} must have at most {_LONGEST_LABEL} characters, got {len(text)}: {text[:40]!r}..."
        )
    return text


def _generate_id() -> str:
    run_id = _GeneratedId(new_run_id())
    run_id.fresh_in = _GeneratedId.process
    return run_id


class RunConfig(StrictModel):
    """Configuration of runs. Names of times include their unit.

    Attributes:
        run_id: id of the run, any text. The default is a new id for each run.
        pipeline: name of a bare list of nodes in metrics and spans. Use few different names.
        budget: limits of one run.
        shared_budgets: one or several budgets that this run shares with other runs, in addition to its own.
        limits: rate limits by name. Attempts of the nodes under one name share its limit, across all runs
            that have it.
        node_limits: name of the limit by node id. A node without an entry uses the limit named like its id,
            if one exists.
        breaker: circuit breaker that stops calls to a provider that fails too often.
        policy_map: retries by failure class.
        node_policies: retries by node id, then by failure class. The only way to retry a whole group.
        hooks: one set of hooks or several.
        classifiers: functions that classify exceptions, called in order before everything else; the first
            result counts.
        context: object that nodes with the arguments ``(state, ctx)`` receive. It is not copied: all runs of
            the config share it.
        contract_retries: further attempts by node id after an output that broke its contract. Such a
            violation is RECOVERABLE, the last one TERMINAL. The next attempt reads it at
            ``current_node().last_failure``.
        node_timeouts: time limit in milliseconds by node id, for the function alone, or a NodeTimeout, which
            can also limit the time between two events that the node emits. Under a group's id: for the group.
        resume_from: id of the node to start at, with the checkpoint of the node before it.
        resume: continue the last execution of this run id at its first position without a commit. The same as
            ``if_exists="resume"``.
        retry_failed_items: on a resume, run the failed items of maps again, and what comes after those maps.
            A start with ``resume_from`` and a fork use the recorded failures.
        if_exists: handling of a run id that was used before. "new" starts a new execution of a run that has
            ended. It raises RunExists for a run that has not ended (RUNNING without an owner, INTERRUPTED,
            SUSPENDED, QUEUED), and for a run that has called an effect in any execution. "restart" starts a
            new execution of any run, and discards the last one. "resume" continues the last one, "return"
            returns the result of a finished run and continues any other, "error" raises RunExists. "resume"
            and "return" compare the input.
        if_running: handling of a run that another process owns. "error" raises RunBusy. "attach" waits and
            returns the result, if the input is the same and ``resume_from`` is not set. "take_over" fences
            that process off: use it only if the owner is dead.
        allow_changes: resume although the pipeline has changed. Recorded outputs are matched by position and
            must satisfy the present schema of the node there.
        check: prove before each run that the output of each node can satisfy the input of the next one.
            Raises CheckFailed where it never can.
        max_recoveries: deaths of the process in one run before that run is FAILED with reason "poison",
            without another call. Journal stores only. Deaths do not count if the owner is this process, or is
            plain code that does not report its end.
        force_resume: resume a run that failed with reason "poison"; the count of deaths starts again at 0.
        on_budget: handling of a run of a pipeline or flow that reaches a limit of its budget. "stop" ends it
            as PARTIAL; "wait" ends it as SUSPENDED with reason "budget" until ``set_budget()`` raises the
            limit.
        inline_wait_seconds: longest wait of a flow inside the process. For a later time the run is SUSPENDED.
        lease_seconds: time after which a run whose owner stopped renewing its lease can be taken over.
        model_fallbacks: cheaper models to signal once their share of ``max_cost_usd`` is spent.
        unknown_model: handling of tokens without a known price: of an unknown model, or reported without a
            model. "warn" counts them as 0 USD, "error" stops the run. None: "error" for nodes under a cost
            limit (``budget.max_cost_usd`` or that of a shared budget), else "warn".
        max_threads: maximum number of plain ``def`` nodes of a runner that run at once in an event loop, each
            in a thread. Others wait for their turn, outside of their time limits. Nodes inside such a node
            have separate places.
        hook_errors: "isolate" logs exceptions of hooks; "raise" raises HookError once the run is complete
            (for tests).
        hook_delivery: "at_least_once" records with each attempt that its end hooks are pending. A resume
            calls them if the process died first. ``current_node().redelivered`` is then True, and the
            exception is a RunFailed with the old message. on_run_end is called before the store records the
            end. A process that recovers the run after a death in between calls it again. Needs a journal
            store, and costs a second write per attempt.
        hook_timeout_ms: time limit of one call of a hook. None: no limit.
        tags: labels to find the run by, such as "nightly" or "customer=42", at most 200 characters each. A
            journal store saves them; ``stroma runs --tag`` and the web interface filter by them.
        conversation: id of the conversation or session that the runs belong to, at most 200 characters. Spans
            of OpenTelemetry have it, also those of a resume or fork without it. Stores save it in plain text.
        user: id of the user whom the runs serve, at most 200 characters, used and stored as ``conversation``
            is.
        redact: function applied to each state dict before a hook or log line receives it. If it raises, the
            state is replaced. It also receives the message of a failure, as ``{"message": text}``, without
            what it removes from states, before the message is recorded or logged. A hook that reads
            ``current_node().last_failure`` gets the same exception as the node.
        keep_rejected: amount of an output that broke its contract to store with the attempt, for ``stroma
            show``, the web interface and notebooks. "redacted": at most 64 KiB, through ``redact``. "full":
            at most 1 MiB, not through ``redact``. "no": nothing. Secrets are masked in both. It changes
            nothing about the exception: a failure hook that reads ``exc.raw`` sees the output, through
            ``redact``.
        events: "store" stores the events of ``stream()`` in the background, for ``runner.follow()`` in any
            process: states and emitted data, through ``redact``. The store has about the newest 1,000 batches
            of each run, of one day; a batch has the events of 0.1 s. Needs a journal store. Events that
            cannot be stored are lost, with a warning; the run never waits for them. "none": nothing is
            stored.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    run_id: str = Field(default_factory=_generate_id)
    pipeline: str = "pipeline"
    budget: ExecutionBudget = Field(default_factory=ExecutionBudget.unlimited)
    shared_budgets: Annotated[SharedBudget | Sequence[SharedBudget], SkipValidation] = ()
    limits: Annotated[dict[str, Limit], SkipValidation] = Field(default_factory=dict)
    node_limits: dict[str, str] = Field(default_factory=dict)
    breaker: Annotated[Breaker | None, SkipValidation] = None
    policy_map: PolicyMap = Field(default_factory=default_policy_map)
    node_policies: dict[str, PolicyMap] = Field(default_factory=dict)
    hooks: Annotated[AnyHooks, SkipValidation] = Field(default_factory=NodeHooks)
    classifiers: Annotated[list[Classifier], SkipValidation] = Field(default_factory=list)
    context: Any = Field(default_factory=dict)
    node_timeouts: dict[str, int | NodeTimeout] = Field(default_factory=dict)
    contract_retries: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    resume_from: str | None = None
    resume: bool = False
    retry_failed_items: bool = False
    if_exists: Literal["new", "restart", "resume", "return", "error"] = "new"
    if_running: Literal["error", "attach", "take_over"] = "error"
    max_recoveries: int = Field(default=5, ge=1, le=LARGEST)
    force_resume: bool = False
    allow_changes: bool = False
    check: bool = False
    on_budget: Literal["stop", "wait"] = "stop"
    lease_seconds: float = Field(default=30.0, ge=0.1, le=1e12)
    inline_wait_seconds: float = Field(default=60.0, ge=0, allow_inf_nan=False)
    model_fallbacks: list[FallbackPolicy] = Field(default_factory=list)
    unknown_model: Literal["warn", "error"] | None = None
    max_threads: int = Field(default=40, ge=1)
    hook_errors: Literal["isolate", "raise"] = "isolate"
    hook_delivery: Literal["at_most_once", "at_least_once"] = "at_most_once"
    hook_timeout_ms: int | None = Field(default=5000, gt=0, le=LARGEST)
    tags: tuple[str, ...] = ()
    conversation: str | None = None
    user: str | None = None
    redact: Annotated[Callable[[dict[str, Any]], dict[str, Any]] | None, SkipValidation] = None
    keep_rejected: Literal["redacted", "full", "no"] = "redacted"
    events: Literal["none", "store"] = "none"

    if TYPE_CHECKING:
        # Names of failure classes are taken where an attribute has the classes themselves.
        def __init__(self, **fields: Unpack[RunConfigFields]) -> None: ...

    def with_settings_of(self, other: RunConfig) -> RunConfig:
        """Return the config with the fields that another one was given, which win."""
        fields = other.model_fields_set
        return self.model_copy(update={name: getattr(other, name) for name in fields}) if fields else self

    def with_run_id(self, run_id: str) -> RunConfig:
        """Return the same config for a run of that id. Raises ValueError for an illegal id."""
        return self.model_copy(update={"run_id": check_id(run_id, "run id")})

    @property
    def budgets(self) -> Sequence[SharedBudget]:
        """The shared budgets, in one order for every process: no two calls wait for each other."""
        budgets = self.shared_budgets
        return budgets if isinstance(budgets, Sequence) else (budgets,)

    def limit_of(self, node_id: str) -> str | None:
        """Return the name of the limit of a node: the configured one, else that of its own id."""
        name = self.node_limits.get(node_id, node_id)
        return name if name in self.limits else None

    @property
    def gated(self) -> bool:
        """Return True if attempts may wait at a shared budget, limit or breaker."""
        return bool(self.shared_budgets or self.limits or self.breaker is not None)

    @property
    def names_ids(self) -> bool:
        """Return True if fields name ids of nodes, or limits and budgets that are for some nodes."""
        by_node = self.node_policies or self.node_timeouts or self.contract_retries or self.node_limits
        return bool(by_node or self.limits or self.shared_budgets)

    @property
    def retried_ids(self) -> set[str]:
        """Return the ids of nodes and groups that ``node_policies`` grants retries."""
        return {
            node_id
            for node_id, policies in self.node_policies.items()
            if any(policy.max_retries for policy in policies.values())
        }

    def take_run_id(self) -> str:
        """Return the id of the next run: the configured one, or a fresh one; a generated id counts once."""
        run_id = self.run_id
        if type(run_id) is not _GeneratedId:
            return run_id
        # Atomic between threads.
        is_fresh = vars(run_id).pop("fresh_in", None) is _GeneratedId.process
        return str(run_id) if is_fresh else new_run_id()

    @field_validator("run_id", "pipeline")
    @classmethod
    def _legal_id(cls, value: str, info: ValidationInfo) -> str:
        return check_id(value, "run id" if info.field_name == "run_id" else "pipeline name")

    @field_validator("hooks")
    @classmethod
    def _are_hooks(cls, value: Any) -> Any:
        sets = flatten(value)
        return value if isinstance(value, (NodeHooks, Sequence)) else sets  # What can be read once has been.

    @field_validator("classifiers")
    @classmethod
    def _take_exceptions(cls, value: Any) -> Any:
        if not isinstance(value, (Iterable, NoneType)):
            raise TypeError(f"classifiers must be a list of functions, got {value!r}; pass [{value!r}]")
        if not isinstance(value, (Sequence, NoneType)):
            value = list(value)  # An iterator can be read once.
        for index, classifier in enumerate(value or ()):
            check_plain(f"classifiers[{index}]", classifier, ("exception", "context"))
        return value

    @field_validator("redact")
    @classmethod
    def _takes_states(cls, value: Any) -> Any:
        if value is not None:
            check_plain("redact", value, ("state",))
        return value

    @field_validator("shared_budgets")
    @classmethod
    def _are_budgets(cls, value: Any) -> Any:
        from stroma.limits.shared_budget import check_budgets

        return check_budgets(value)

    @field_validator("breaker")
    @classmethod
    def _is_a_breaker(cls, value: Any) -> Any:
        from stroma.limits.breaker import check_breaker

        return None if value is None else check_breaker(value)

    @field_validator("node_limits")
    @classmethod
    def _have_limits(cls, value: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        from stroma.limits.rate_limit import check_limits

        check_limits(info.data.get("limits", {}), value)
        return value

    @field_validator("limits")
    @classmethod
    def _are_limits(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f'limits must be a dict, got {shown(value)}; pass {{"name": Limit(...)}}')
        from stroma.limits.rate_limit import check_limits

        check_limits(value, {})
        return value

    @field_validator("tags")
    @classmethod
    def _legal_tags(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for tag in value:
            check_label(tag, "tag")
        return value

    @field_validator("conversation", "user")
    @classmethod
    def _legal_label(cls, value: str | None, info: ValidationInfo) -> str | None:
        return None if value is None else check_label(value, str(info.field_name))

    @field_validator("node_timeouts", mode="before")
    @classmethod
    def _milliseconds(cls, value: Any) -> Any:
        for node_id, limit in value.items() if isinstance(value, dict) else ():
            seconds = limit.total_seconds() if isinstance(limit, timedelta) else limit
            if isinstance(limit, timedelta) or (isinstance(limit, float) and limit % 1 > 0):
                raise ValueError(
                    f"node_timeouts[{node_id!r}] must be a whole number of milliseconds, got {limit!r}; "
                    f"pass {seconds * 1000:.0f} for {seconds:g} seconds"
                )
        return value

    @field_validator("node_timeouts")
    @classmethod
    def _positive(cls, value: dict[str, int | NodeTimeout]) -> dict[str, int | NodeTimeout]:
        for node_id, limit in value.items():
            if not isinstance(limit, NodeTimeout) and not 0 < limit <= LARGEST:
                raise ValueError(
                    f"node_timeouts[{node_id!r}] must be a positive number of milliseconds up to 10**30, "
                    f"got {shown(limit)}"
                )
        return value


#: The defaults that every config shares, in the order of the fields, and the functions that make the others.
_SHARED_DEFAULTS: Final = {name: field.default for name, field in RunConfig.model_fields.items()}
_FACTORIES: Final = {
    name: cast("Callable[[], Any]", field.default_factory)
    for name, field in RunConfig.model_fields.items()
    if field.default_factory is not None
} | {"budget": partial(replicate, ExecutionBudget.unlimited())}


def default_config() -> RunConfig:
    """Return ``RunConfig()``, without its validators: 10 us less of the 90 of a run of one node."""
    others = {name: make() for name, make in _FACTORIES.items()}
    return construct(RunConfig, {**_SHARED_DEFAULTS, **others}, set())


#: Retries by failure class, or by the name of one. Not Literal: mypy would take no dict of names for it.
Policies: TypeAlias = PolicyMap | Mapping[str, FailurePolicy]


class OtherFields(TypedDict, Generic[DepsT], total=False):
    """The keywords of :meth:`stroma.StromaRunner.quick` that it does not name; see RunConfig."""

    run_id: str
    pipeline: str
    shared_budgets: SharedBudget | Sequence[SharedBudget]
    limits: dict[str, Limit]
    node_limits: dict[str, str]
    breaker: Breaker | None
    node_policies: Mapping[str, Policies]
    context: DepsT
    node_timeouts: Mapping[str, int | NodeTimeout]
    contract_retries: dict[str, int]
    resume_from: str | None
    resume: bool
    retry_failed_items: bool
    if_exists: Literal["new", "restart", "resume", "return", "error"]
    if_running: Literal["error", "attach", "take_over"]
    max_recoveries: int
    force_resume: bool
    allow_changes: bool
    check: bool
    on_budget: Literal["stop", "wait"]
    lease_seconds: float
    inline_wait_seconds: float
    model_fallbacks: Sequence[FallbackPolicy]
    unknown_model: Literal["warn", "error"] | None
    max_threads: int
    hook_errors: Literal["isolate", "raise"]
    hook_delivery: Literal["at_most_once", "at_least_once"]
    hook_timeout_ms: int | None
    tags: Sequence[str]
    conversation: str | None
    user: str | None
    redact: Callable[[dict[str, Any]], dict[str, Any]] | None
    keep_rejected: Literal["redacted", "full", "no"]
    events: Literal["none", "store"]


class RunConfigFields(OtherFields[Any], total=False):
    """The keywords of :class:`stroma.RunConfig`."""

    budget: ExecutionBudget
    policy_map: Policies
    hooks: NodeHooks | Sequence[NodeHooks]
    classifiers: list[Classifier]
