"""What is shipped for operators: valid, only of measured names, with alerts that fire."""

import itertools
import json
import math
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from tests.receivers.prometheus import SharedPrometheus, promtool
from tests.telemetry.names import DATADOG, PROMETHEUS, VALUES, labels_of
from tests.telemetry.promql import parse

from stroma.cli import app

pytest_plugins = ["tests.receivers.fixtures"]

ASSETS = Path(str(resources.files("stroma"))) / "telemetry" / "assets"
GRAFANA = json.loads((ASSETS / "grafana-dashboard.json").read_text())
DATADOG_BOARD = json.loads((ASSETS / "datadog-dashboard.json").read_text())
ALERTS = [
    rule
    for group in yaml.safe_load((ASSETS / "prometheus-alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
RECORDED = yaml.safe_load((ASSETS / "prometheus-recording.yml").read_text())["groups"][0]["rules"]
PANELS = [panel for panel in GRAFANA["panels"] if panel["type"] != "row"]
TARGETS = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]
EXPRESSIONS = [(title, target["expr"]) for title, target in TARGETS] + [
    (rule.get("alert") or rule["record"], rule["expr"]) for rule in (*ALERTS, *RECORDED)
]


@pytest.mark.parametrize(("title", "text"), EXPRESSIONS)
def test_queries_name_what_is_measured(title: str, text: str) -> None:
    """Queries name series, labels and values that the exporter writes, and group by labels that all have."""
    query = parse(text)
    assert query.selectors
    common = frozenset.intersection(*(labels_of(name) for name, _ in query.selectors))
    assert query.grouping - {"le"} <= common
    assert "le" not in query.grouping or any("le" in labels_of(name) for name, _ in query.selectors)
    for name, matchers in query.selectors:
        for label, operator, value in matchers:
            assert label in labels_of(name)
            if label in VALUES:
                assert set(value.split("|") if "~" in operator else [value]) <= VALUES[label]


class TestPromql:
    """The parser that these tests rely on."""

    def test_query(self) -> None:
        """It finds series, matchers, grouping and functions."""
        query = parse(
            'sum by (a, le) (rate(x_bucket{b="}",c=~"1|2"}[5m] offset 1h)) / on (a) y > 0.5 or abs(z)'
        )
        assert query.selectors == [("x_bucket", [("b", "=", "}"), ("c", "=~", "1|2")]), ("y", []), ("z", [])]
        assert query.grouping == {"a", "le"}
        assert query.functions == {"sum", "rate", "abs"}

    @pytest.mark.parametrize("text", ["sum(x) ? 1", 'x{a="b}', "x{a=b}"])
    def test_not_promql(self, text: str) -> None:
        """What it cannot read is an error, not a query without series."""
        with pytest.raises(ValueError):
            parse(text)


class TestGrafana:
    def test_imports_anywhere(self) -> None:
        """It has no id of an installation, and asks for its data source by a variable."""
        assert GRAFANA["id"] is None
        assert "__inputs" not in GRAFANA
        datasource = {"type": "prometheus", "uid": "${datasource}"}
        source, pipeline = GRAFANA["templating"]["list"]
        assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
        assert (pipeline["name"], pipeline["datasource"]) == ("pipeline", datasource)
        for panel in PANELS:
            assert panel["datasource"] == datasource
            assert all(target["datasource"] == datasource for target in panel["targets"])

    def test_layout(self) -> None:
        """Panels have ids of their own, fit into the 24 columns and do not lie on each other."""
        ids = [panel["id"] for panel in GRAFANA["panels"]]
        assert len(ids) == len(set(ids))
        taken: set[tuple[int, int]] = set()
        for at in (panel["gridPos"] for panel in GRAFANA["panels"]):
            assert at["x"] + at["w"] <= 24
            cells = set(
                itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"]))
            )
            assert not cells & taken
            taken |= cells

    def test_every_metric_is_shown(self) -> None:
        """Each metric is on the dashboard, always for the chosen pipelines only."""
        selectors = [result for _, target in TARGETS for result in parse(target["expr"]).selectors]
        assert {re.sub("_(bucket|sum|count)$", "", name) for name, _ in selectors} == set(PROMETHEUS)
        assert all(("pipeline", "=~", "$pipeline") in matchers for _, matchers in selectors)

    @pytest.mark.parametrize(("title", "target"), TARGETS)
    def test_legends(self, title: str, target: dict[str, Any]) -> None:
        """A legend names labels that its query keeps."""
        query = parse(target["expr"])
        named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        assert named <= query.grouping
        assert not query.grouping - {"le"} or named or target.get("format") == "table"

    def test_each_panel_shows_something(self, prometheus: SharedPrometheus) -> None:
        """A real server answers each query of the dashboard with numbers, from a series' first event."""
        variables = {"$pipeline": ".*", "$__rate_interval": "1m", "$__range": "1h"}
        registry = CollectorRegistry()
        metrics = {name: metric(name, registry) for name in PROMETHEUS}
        with prometheus.exposing(registry):
            # A quantile needs a rate, and that two scrapes; counters need only the last one.
            for kinds in ({"gauge", "histogram"}, {"counter", "gauge", "histogram"}):
                for name, (kind, labels) in PROMETHEUS.items():
                    if kind in kinds:
                        happen(metrics[name], labels)
                prometheus.scraped()
            for title, target in TARGETS:
                text = re.sub(r"\$\w+", lambda result: variables[result.group()], target["expr"])
                result = prometheus.query(text)
                assert result, (title, text)
                assert all(value > 0 and math.isfinite(value) for _, value in result), (title, text, result)


def metric(name: str, registry: CollectorRegistry) -> Any:
    kind, labels = PROMETHEUS[name]
    instance = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}[kind]
    return instance(name, "Some help.", sorted(labels), registry=registry)


def happen(metric: Any, labels: frozenset[str]) -> None:
    """One event for each combination of the labels' values."""
    names = sorted(labels)
    for values in itertools.product(*(sorted(VALUES.get(name, {"assets"})) for name in names)):
        child = metric.labels(*values)
        child.observe(1) if hasattr(child, "observe") else child.inc()


class TestAlerts:
    @pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
    def test_says_what_to_do(self, rule: dict[str, Any]) -> None:
        """An alert has a severity, a summary, a description and a way out; they name labels that it has."""
        assert rule["alert"].startswith("Stroma")
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}
        query = parse(rule["expr"])
        for text in rule["annotations"].values():
            assert set(re.findall(r"\$labels\.(\w+)", text)) <= query.grouping - {"le"}
            assert text.endswith(".")

    def test_commands_exist(self) -> None:
        """The commands that a runbook names are commands."""
        named = set(re.findall(r"`stroma (\w+)", "".join(rule["annotations"]["runbook"] for rule in ALERTS)))
        group = next(result for result in vars(app).values() if isinstance(result, click.Group))
        assert named
        assert named <= set(group.list_commands(click.Context(group)))

    @pytest.mark.slow
    def test_rules(self) -> None:
        """promtool accepts the rules."""
        assert f"{len(ALERTS)} rules found" in promtool(
            "check", "rules", str(ASSETS / "prometheus-alerts.yml")
        )

    @pytest.mark.slow
    def test_unit_tests_pass(self) -> None:
        """promtool runs the unit tests that are shipped beside the rules, and they pass."""
        assert "SUCCESS" in promtool("test", "rules", str(ASSETS / "prometheus-alerts.test.yml"))

    def test_each_alert_is_tested_both_ways(self) -> None:
        """For each alert there is a test in which it fires, and one in which it does not."""
        cases = yaml.safe_load((ASSETS / "prometheus-alerts.test.yml").read_text())["tests"]
        tested = {
            (check["alertname"], bool(check["exp_alerts"]))
            for case in cases
            for check in case["alert_rule_test"]
        }
        assert tested == set(itertools.product((rule["alert"] for rule in ALERTS), (True, False)))


class TestRecording:
    @pytest.mark.parametrize("rule", RECORDED, ids=lambda rule: rule["record"])
    def test_a_name_says_the_labels_that_remain(self, rule: dict[str, str]) -> None:
        """A rule is named labels:metric:operation by its grouping labels and its metric."""
        labels, metric, _ = rule["record"].split(":")
        query = parse(rule["expr"])
        assert query.grouping - {"le"} == {
            label for label in ("pipeline", "status", "node_id", "model") if label in labels
        }
        assert all(name.startswith(metric.removesuffix("s")[:12]) for name, _ in query.selectors)

    def test_each_rule_is_tested(self) -> None:
        """The unit tests beside the rules ask for each of them."""
        cases = yaml.safe_load((ASSETS / "prometheus-recording.test.yml").read_text())["tests"]
        asked = " ".join(check["expr"] for case in cases for check in case["promql_expr_test"])
        assert {rule["record"] for rule in RECORDED} == set(re.findall(r"\w+:\w+:\w+", asked))

    @pytest.mark.slow
    def test_unit_tests_pass(self) -> None:
        """promtool accepts the rules, and its run of their unit tests passes."""
        rules = str(ASSETS / "prometheus-recording.yml")
        assert f"{len(RECORDED)} rules found" in promtool("check", "rules", rules)
        assert "SUCCESS" in promtool("test", "rules", str(ASSETS / "prometheus-recording.test.yml"))


def datadog_widgets(widgets: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for widget in widgets:
        assert set(widget) == {"definition"}  # No id of an account's own.
        if widget["definition"]["type"] == "group":
            yield from datadog_widgets(widget["definition"]["widgets"])
        else:
            yield widget["definition"]


DATADOG_QUERIES = [
    (widget["title"], query)
    for widget in datadog_widgets(DATADOG_BOARD["widgets"])
    for request in widget["requests"]
    for query in request["queries"]
]


class TestDatadog:
    @pytest.mark.parametrize(("title", "query"), DATADOG_QUERIES)
    def test_queries_name_what_is_measured(self, title: str, query: dict[str, str]) -> None:
        """Every metric, tag and value in a query is one that is sent, aggregated as its type can be."""
        form = (
            r"(?P<how>\w+):(?P<name>[\w.]+)\{(?P<filter>[^{}]*)\}( by "
            r"\{(?P<by>[\w,]+)\})?(?P<count>\.as_count\(\))?"
        )
        result = re.fullmatch(form, query["query"])
        kind, tags = DATADOG[result["name"]]
        if kind == "count":
            assert (result["how"], result["count"]) == ("sum", ".as_count()")
        else:
            assert (result["how"], result["count"]) in {("p50", None), ("p95", None)}
        assert set((result["by"] or "pipeline").split(",")) <= tags
        words = set(re.findall(r"[^\s,()]+", result["filter"])) - {"AND", "OR"}
        assert "$pipeline" in words
        for word in words - {"$pipeline"}:
            tag, _, value = word.partition(":")
            assert tag in tags
            # Datadog keeps tags in lower case.
            assert value in {known.lower() for known in VALUES[tag]}

    def test_every_metric_is_shown(self) -> None:
        """Each metric is on the dashboard."""
        assert {query["query"].partition(":")[2].partition("{")[0] for _, query in DATADOG_QUERIES} == set(
            DATADOG
        )

    def test_formulas(self) -> None:
        """A formula uses the queries of its request, all of them."""
        for widget in datadog_widgets(DATADOG_BOARD["widgets"]):
            for request in widget["requests"]:
                used = set(re.findall(r"\b[a-z]\b", " ".join(at["formula"] for at in request["formulas"])))
                assert used == {query["name"] for query in request["queries"]}

    def test_variable(self) -> None:
        """The pipeline is chosen by a variable, which starts at all of them."""
        (variable,) = DATADOG_BOARD["template_variables"]
        assert (variable["name"], variable["prefix"], variable["defaults"]) == ("pipeline", "pipeline", ["*"])


def test_no_account_is_in_the_assets() -> None:
    """No asset has an address or an id of anybody's installation."""
    for path in ASSETS.iterdir():
        text = path.read_text()
        assert "://" not in text
        assert not re.search(r'"(id|org_id|author_handle|url)": "?[\w-]*\d{4}', text), path.name
