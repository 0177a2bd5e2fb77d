"""What a run spent, its limits and its fallbacks, to the last figure."""

import math
import pickle
from dataclasses import astuple
from typing import Any

import pytest
from pydantic import ValidationError

from stroma import BudgetExceeded, CostTracker, ExecutionBudget, FallbackPolicy, NodeUsage
from stroma.cost import KNOWN_MODELS, ModelHint, StepUsage, UsageError, estimate_cost_usd, resolve_model
from stroma.cost.budget import LARGEST, limits
from stroma.cost.fallback import fallback_due, is_reached


def spent(cost: float = 0.0, tokens: int = 0, ms: float = 0.0) -> CostTracker:
    tracker = CostTracker()
    tracker.add("node", tokens, 0, cost, round(ms * 1e6), None)
    return tracker


@pytest.mark.parametrize(
    ("dimension", "limit", "actual", "text"),
    [
        (
            "tokens",
            1000,
            1234567890123,
            "budget exceeded: max_tokens_total limit 1000 tokens, used 1.23456789012e+12 tokens (tokens) at "
            "node 'a'; "
            "raise max_tokens_total, then resume the run",
        ),
        (
            "cost",
            0.5,
            0.75,
            "budget exceeded: max_cost_usd limit $0.5, used $0.75 (cost) at node 'a'; raise "
            "max_cost_usd, then resume the run",
        ),
        (
            "latency",
            100,
            100.25,
            "budget exceeded: max_latency_ms limit 100 ms, used 100.25 ms (latency) at node 'a'; "
            "raise max_latency_ms, then resume the run",
        ),
    ],
)
def test_what_a_crossed_limit_says(dimension: Any, limit: float, actual: float, text: str) -> None:
    """The limit by its name, both figures with their unit, the node, and the mend; pickled, too."""
    error = BudgetExceeded(dimension, limit, actual, "a")
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert (one.dimension, one.limit, one.actual, one.node_id) == (dimension, limit, actual, "a")
        assert one.args == (dimension, limit, actual, "a")
        assert str(one) == text


@pytest.mark.parametrize(
    ("dimension", "parameter", "option"),
    [
        ("tokens", "tokens", "tokens"),
        ("cost", "cost_usd", "cost-usd"),
        ("latency", "latency_ms", "latency-ms"),
    ],
)
def test_what_a_crossed_limit_of_one_run_says(dimension: Any, parameter: str, option: str) -> None:
    """A limit of the run replaces the config's: the message says where to raise it; pickled, too."""
    error = BudgetExceeded(dimension, 1, 2, "a", is_set_for_run=True)
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert one.args == (dimension, 1, 2, "a")
        assert str(one).endswith(
            f" at node 'a'; the limit was set for this run: raise it with set_budget({parameter}=...) or "
            f"`stroma budget RUN --{option}`, then resume the run"
        )


def test_a_budget_without_limits() -> None:
    """All of them are None, whichever way it is made, and none is listed."""
    for budget in (ExecutionBudget(), ExecutionBudget.unlimited()):
        assert budget.model_dump() == {"max_tokens_total": None, "max_cost_usd": None, "max_latency_ms": None}
        assert limits(budget) == ()
        assert spent(1e9, 10**9, 1e9).exceeded(budget, "node") is None


@pytest.mark.parametrize("name", ["max_tokens_total", "max_cost_usd", "max_latency_ms"])
def test_a_limit_is_zero_or_more(name: str) -> None:
    """None is no limit, zero is one, less is refused, and so is what is no number."""
    assert getattr(ExecutionBudget.unlimited(), name) is None
    assert getattr(ExecutionBudget(**{name: 0}), name) == 0
    for wrong in (-1, -0.001, math.inf, math.nan, "much"):
        with pytest.raises(ValidationError) as caught:
            ExecutionBudget(**{name: wrong})
        assert [error["loc"] for error in caught.value.errors()] == [(name,)]


@pytest.mark.parametrize("name", ["max_tokens_total", "max_latency_ms"])
def test_the_largest_limit(name: str) -> None:
    """None is larger; a whole number of thirty zeros is one; more is refused."""
    assert getattr(ExecutionBudget.unlimited(), name) is None
    assert LARGEST == 1_000_000_000_000_000_000_000_000_000_000
    assert getattr(ExecutionBudget(**{name: LARGEST}), name) == LARGEST
    with pytest.raises(ValidationError):
        ExecutionBudget(**{name: LARGEST + 1})
    assert ExecutionBudget(max_cost_usd=1e300).max_cost_usd == 1e300


def test_a_limit_that_is_misspelt_is_refused() -> None:
    """It would be no limit, and who wants none says so."""
    assert ExecutionBudget.unlimited() == ExecutionBudget()
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        ExecutionBudget(max_cost=1)


@pytest.mark.parametrize(
    ("budget", "at", "above", "report"),
    [
        ({"max_tokens_total": 10}, (0, 10, 0), (0, 11, 0), ("tokens", 10, 11)),
        ({"max_tokens_total": 0}, (1, 0, 1), (0, 1, 0), ("tokens", 0, 1)),
        ({"max_cost_usd": 0.5}, (0.5, 9, 9), (0.500000001, 0, 0), ("cost", 0.5, 0.500000001)),
        ({"max_cost_usd": 0.5}, (0.5000000004, 0, 0), (0.5000000006, 0, 0), ("cost", 0.5, 0.500000001)),
        ({"max_cost_usd": 0}, (0, 9, 9), (0.001, 0, 0), ("cost", 0, 0.001)),
        ({"max_latency_ms": 10}, (9, 9, 10), (0, 0, 10.000001), ("latency", 10, 10.000001)),
        ({"max_latency_ms": 0}, (9, 9, 0), (0, 0, 0.000001), ("latency", 0, 0.000001)),
    ],
)
def test_exactly_at_a_limit_is_within_it(budget: Any, at: Any, above: Any, report: Any) -> None:
    """The least above it is not: a token, a billionth of a dollar, a nanosecond; earlier spend counts."""
    limit = ExecutionBudget(**budget)
    assert spent(*at).exceeded(limit, "a") is None
    spent(*at).check_budget(limit, "a")
    for earlier in (False, True):
        tracker = spent(*above)
        if earlier:
            tracker = CostTracker()
            tracker.prior_cost_usd, tracker.prior_tokens, tracker.prior_latency_ms = above
        error = tracker.exceeded(limit, "a")
        assert (error.dimension, error.limit, error.actual, error.node_id) == (*report, "a")
        with pytest.raises(BudgetExceeded) as caught:
            tracker.check_budget(limit, "a")
        assert caught.value.args == error.args


def test_the_first_limit_that_is_crossed_is_told() -> None:
    """Tokens, then cost, then latency."""
    tracker = spent(2, 2, 2)
    dimensions = []
    for names in (("max_tokens_total", "max_cost_usd", "max_latency_ms"), ("max_cost_usd", "max_latency_ms")):
        error = tracker.exceeded(ExecutionBudget(**dict.fromkeys(names, 1)), "a")
        dimensions.append(error.dimension)
    assert dimensions == ["tokens", "cost"]
    error = tracker.exceeded(ExecutionBudget(max_tokens_total=2, max_cost_usd=2, max_latency_ms=1), "a")
    assert error.dimension == "latency"


def test_what_earlier_processes_spent_counts_for_limits_alone() -> None:
    """Totals are of this process."""
    tracker = spent(0.25, 10, 1.5)
    tracker.prior_tokens, tracker.prior_cost_usd, tracker.prior_latency_ms = 100, 0.5, 20.25
    assert (tracker.total_tokens, tracker.total_cost_usd, tracker.total_latency_ms) == (10, 0.25, 1)
    assert [tracker.used(dimension) for dimension in ("tokens", "cost", "latency")] == [110, 0.75, 21.75]
    assert tracker.latency_ms == 21.75


def test_what_counts_against_a_limit_is_rounded_to_a_billionth() -> None:
    """Ten dimes are a dollar; a ten-billionth is noise."""
    tracker = spent(0.1234567894)
    tracker.prior_cost_usd = 1.0
    assert tracker.used("cost") == 1.123456789
    assert spent(0.0000000006).used("cost") == 0.000000001
    assert spent(0.1).exceeded(ExecutionBudget(max_cost_usd=0.3 - 0.2), "a") is None, "of a limit, too"


def test_sums_by_node() -> None:
    """Every figure by itself; latency in whole milliseconds; the last model that was named stays."""
    tracker = CostTracker()
    tracker.record(NodeUsage("a", 10, 0.25, 3, "m", 4))
    tracker.record(NodeUsage("b", 1, 0.125, 1))
    tracker.record(NodeUsage("a", 20, 0.5, 5, None, 6))
    expected = {"a": NodeUsage("a", 30, 0.75, 8, "m", 10), "b": NodeUsage("b", 1, 0.125, 1, None, 0)}
    assert tracker.summary() == expected
    assert (tracker.total_tokens, tracker.total_cost_usd, tracker.total_latency_ms) == (31, 0.875, 9)
    assert tracker.latency_ns == 9_000_000
    tracker.record(NodeUsage("a", 0, 0.0, 0, "n"))
    assert tracker.summary()["a"].model == "n"
    # Neither the record that is given nor the one that is returned is the tracker's.
    usage = NodeUsage("c", 1, 0.0, 0)
    tracker.record(usage)
    usage.tokens_used = 999
    tracker.record(NodeUsage("c", 1, 0.0, 0))
    assert tracker.summary()["c"].tokens_used == 2
    tracker.summary()["a"].tokens_used = 999
    assert tracker.summary()["a"].tokens_used == 30


def test_sums_by_node_are_those_of_the_trace_too() -> None:
    """What the engine's own figures say is added to what was recorded by hand, totals unchanged."""
    tracker = CostTracker()
    tracker.record(NodeUsage("a", 10, 0.25, 3, "m", 4))
    tracker.per_node = lambda: [("a", 1, 2, 0.5, 1_999_999, None), ("b", 5, 3, 0.125, 999_999, "n")]
    for _ in range(2):
        assert tracker.summary() == {
            "a": NodeUsage("a", 11, 0.75, 4, "m", 6),
            "b": NodeUsage("b", 5, 0.125, 0, "n", 3),
        }
    assert (tracker.total_tokens, tracker.total_cost_usd) == (10, 0.25)


def test_latency_is_kept_to_the_nanosecond() -> None:
    """Also where it is given in fractions of a millisecond."""
    tracker = CostTracker()
    tracker.record(NodeUsage("a", 0, 0.0, 0.0000016))
    tracker.record(NodeUsage("a", 0, 0.0, 1.999998))
    assert (tracker.latency_ns, tracker.total_latency_ms, tracker.latency_ms) == (2_000_000, 2, 2.0)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"cost_usd": -0.5}, "cost_usd=-0.5, latency_ms=1"),
        ({"cost_usd": math.inf}, "cost_usd=inf, latency_ms=1"),
        ({"cost_usd": math.nan}, "cost_usd=nan, latency_ms=1"),
        ({"latency_ms": -1}, "cost_usd=0.5, latency_ms=-1"),
        ({"latency_ms": math.inf}, "cost_usd=0.5, latency_ms=inf"),
        ({"latency_ms": math.nan}, "cost_usd=0.5, latency_ms=nan"),
    ],
)
def test_figures_that_are_refused_are_named(wrong: dict[str, Any], text: str) -> None:
    """With the node and the mend, and nothing is recorded."""
    tracker = CostTracker()
    with pytest.raises(UsageError) as caught:
        tracker.record(
            NodeUsage(**{"node_id": "a", "tokens_used": 1, "cost_usd": 0.5, "latency_ms": 1, **wrong})
        )
    assert str(caught.value) == f"node 'a' reported {text}; report finite figures, zero or more"
    assert (tracker.summary(), tracker.total_tokens, tracker.latency_ns) == ({}, 0, 0)


@pytest.mark.parametrize("name", ["tokens_used", "output_tokens"])
def test_tokens_that_are_refused_are_named(name: str) -> None:
    """Both counts are looked at, by the name of the node."""
    tracker = CostTracker()
    fields = {"node_id": "a", "tokens_used": 1, "cost_usd": 0.5, "latency_ms": 1, name: -3}
    with pytest.raises(UsageError) as caught:
        tracker.record(NodeUsage(**fields))
    assert (
        str(caught.value)
        == "node 'a' reported -3 tokens; report whole numbers of tokens, 0 to 1,000,000,000, "
        "or return the output alone"
    )
    assert tracker.summary() == {}


@pytest.mark.parametrize(
    "figures", [[0.1] * 10, [1e16, 1.0, -1e16 + 1e16, 1.0], [1.0, 1e16, 1.0], [3.0, 1e-17, 3.0]]
)
def test_costs_are_summed_exactly(figures: list[float]) -> None:
    """Whatever the order: the total is what an exact sum comes to."""
    tracker = CostTracker()
    for cost in figures:
        tracker.spend(1, cost)
    assert tracker.total_cost_usd == math.fsum(figures)
    assert tracker.used("cost") == round(math.fsum(figures), 9)
    assert tracker.total_tokens == len(figures)
    assert tracker.summary() == {}


def test_the_records_have_their_defaults() -> None:
    """A fallback is for four fifths of the limit; hints and usages name no model by themselves."""
    assert astuple(FallbackPolicy("a", "b")) == ("a", "b", 0.8)
    assert [is_reached(FallbackPolicy("a", "b"), spent(cost), 10) for cost in (7.99, 8)] == [False, True]
    assert astuple(ModelHint("node", "a")) == ("node", "a", None, None)
    assert astuple(NodeUsage("node", 1, 0.5, 2)) == ("node", 1, 0.5, 2, None, 0)
    assert StepUsage is NodeUsage
    assert callable(estimate_cost_usd)
    assert isinstance(KNOWN_MODELS, dict)


@pytest.mark.parametrize(
    ("share", "limit", "cost", "expected"),
    [
        (0.8, 1.0, 0.8, True),
        (0.8, 1.0, 0.799999999, False),
        (0.8, 2.0, 1.6, True),
        (0.8, 2.0, 1.5, False),
        (0.8, 0.0, 0.0, True),
        (0.0, 5.0, 0.0, True),
        (1.0, 5.0, 5.0, True),
        (1 / 3, 1.0, 0.333333333, True),
        (1 / 3, 1.0, 0.333333332, False),
        (0.1, 3.0, 0.1 + 0.2, True),
    ],
)
def test_a_share_of_a_limit_is_exact(share: float, limit: float, cost: float, expected: bool) -> None:
    """To the billionth of a dollar; what earlier processes spent counts."""
    rule = FallbackPolicy("a", "b", share)
    earlier = CostTracker()
    earlier.prior_cost_usd = cost
    for tracker in (spent(cost), earlier):
        assert is_reached(rule, tracker, limit) is expected
        budget = ExecutionBudget(max_cost_usd=limit)
        assert resolve_model("a", tracker, budget, [rule]) == ("b" if expected else "a")
        assert fallback_due(tracker, budget, [rule]) == ("b" if expected else None)


def test_the_first_rule_for_a_model_counts() -> None:
    """A rule for another model does not, nor one not reached; without a limit or a model none does."""
    rules = [
        FallbackPolicy("x", "never", 0.1),
        FallbackPolicy("a", "late", 0.9),
        FallbackPolicy("a", "early", 0.5),
        FallbackPolicy("a", "earlier", 0.1),
    ]
    budget = ExecutionBudget(max_cost_usd=1)
    findings = [resolve_model("a", spent(cost), budget, rules) for cost in (0.05, 0.2, 0.6, 0.95)]
    assert findings == ["a", "earlier", "early", "late"]
    assert resolve_model("b", spent(1), budget, rules) == "b"
    assert resolve_model(None, spent(1), budget, rules) is None
    assert resolve_model("a", spent(1), ExecutionBudget(), rules) == "a"
    assert resolve_model("a", spent(1), budget, []) == "a"


def test_the_furthest_fallback_that_is_due() -> None:
    """By its share wherever it stands; chains too; none below every share, or without a limit."""
    rules = [FallbackPolicy("b", "c", 0.9), FallbackPolicy("a", "b", 0.5), FallbackPolicy("x", "y", 0.7)]
    budget = ExecutionBudget(max_cost_usd=1)
    chosen = [fallback_due(spent(cost), budget, rules) for cost in (0.4, 0.5, 0.7, 0.89, 0.9, 2)]
    assert chosen == [None, "b", "y", "y", "c", "c"]
    assert fallback_due(spent(1), ExecutionBudget(max_tokens_total=1), rules) is None
    assert fallback_due(spent(1), budget, []) is None
    equal = [FallbackPolicy("a", "first", 0.5), FallbackPolicy("a", "second", 0.5)]
    assert fallback_due(spent(1), budget, equal) == "first"
