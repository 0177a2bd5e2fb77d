"""What Phoenix shows of an agent: a real server, asked over its API, and pictures of its pages.

./dev test --framework phoenix
"""

import json
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.frameworks.backends import TREE, Endpoint, Sent, eventually, free_port, send_runs, serving, shoot

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]

PROJECT = "seen"


class Phoenix:
    """A server of Phoenix that has received the runs."""

    def __init__(self, url: str, sent: Sent) -> None:
        self.url, self.sent = url, sent

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return json.load(response)

    def spans(self) -> list[dict[str, Any]]:
        try:
            found = self.get(f"/v1/projects/{PROJECT}/spans?limit=200")["data"]
        except urllib.error.HTTPError as error:
            if error.code == 404:  # The project comes with its first span, some seconds after it was sent.
                return []
            raise
        assert isinstance(found, list)
        return found

    def spans_named(self, start: str) -> list[dict[str, Any]]:
        return [span for span in self.spans() if span["name"].startswith(start)]

    def ask(self, query: str) -> Any:
        request = urllib.request.Request(
            self.url + "/graphql", json.dumps({"query": query}).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert "errors" not in answer, answer
        return answer["data"]

    def project(self, fields: str) -> Any:
        edges = self.ask(f"{{ projects {{ edges {{ node {{ name {fields} }} }} }} }}")["projects"]["edges"]
        return next(edge["node"] for edge in edges if edge["node"]["name"] == PROJECT)


@pytest.fixture(scope="module")
def phoenix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Phoenix]:
    home: Path = tmp_path_factory.mktemp("phoenix")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    settings = {
        "PHOENIX_HOST": "127.0.0.1",
        "PHOENIX_PORT": str(port),
        "PHOENIX_GRPC_PORT": str(free_port()),
        "PHOENIX_WORKING_DIR": str(home),
        "PHOENIX_TELEMETRY_ENABLED": "false",
    }
    with serving("phoenix", "serve", home=home, ready=f"{url}/healthz", **settings):
        endpoint = Endpoint(f"{url}/v1/traces", {}, {"openinference.project.name": PROJECT})
        server = Phoenix(url, send_runs(endpoint, home))
        eventually(lambda: len(server.spans()) == len(TREE))
        yield server


def test_the_tree(phoenix: Phoenix) -> None:
    """A killed and resumed run is one tree, its fork another; nodes are under their flow, map or group."""
    spans = phoenix.spans()
    names = {span["context"]["span_id"]: span["name"] for span in spans}
    assert sorted(((span["name"], names.get(span["parent_id"])) for span in spans), key=str) == TREE
    assert len({span["context"]["trace_id"] for span in spans}) == 3


def test_kinds(phoenix: Phoenix) -> None:
    """Runs, flows, maps, groups, nodes are of kind CHAIN, model calls LLM and tools TOOL, none UNKNOWN."""
    kinds = Counter((span["name"].partition(" ")[0], span["span_kind"]) for span in phoenix.spans())
    names = Counter(name.partition(" ")[0] for name, _ in TREE)
    of_name = {"chat": "LLM", "execute_tool": "TOOL"}
    assert kinds == {(name, of_name.get(name, "CHAIN")): count for name, count in names.items()}


def test_inputs_and_outputs(phoenix: Phoenix) -> None:
    """Each run has the state that it began and ended with, as JSON; each node its own."""
    for span in phoenix.spans():
        if "stroma.node.position" in span["attributes"] or span["parent_id"] is None:
            assert span["attributes"]["input.mime_type"] == "application/json"
            json.loads(span["attributes"]["input.value"])
    letter = {"text": "Your order left on Monday.", "version": 2, "is_good": True}
    for span in phoenix.spans_named("stroma.node send"):
        assert json.loads(span["attributes"]["output.value"]) == letter
    outputs = [
        json.loads(span["attributes"]["output.value"])
        for span in phoenix.spans_named("invoke_workflow support")
        if span["status_code"] != "ERROR"
    ]
    assert outputs == [letter, letter]


def test_errors(phoenix: Phoenix) -> None:
    """The node whose key was refused and its run are errors; retried attempts and killed runs are not."""
    errors = {span["name"]: span for span in phoenix.spans() if span["status_code"] == "ERROR"}
    assert sorted(errors) == ["invoke_workflow support", "stroma.node classify"]
    assert {span["attributes"]["stroma.run.id"] for span in errors.values()} == {"refused"}
    assert errors["stroma.node classify"]["status_message"] == "HTTP 401"


def test_the_session_and_the_user(phoenix: Phoenix) -> None:
    """The runs are one session, with the user; every span has them, the client's too."""
    for span in phoenix.spans():
        assert span["attributes"]["session.id"] == "thread-17", span["name"]
        assert span["attributes"]["user.id"] == "ada", span["name"]
    sessions = phoenix.project("sessions(first: 10) { edges { node { sessionId userId numTraces } } }")[
        "sessions"
    ]
    shown = [edge["node"] for edge in sessions["edges"]]
    assert shown == [{"sessionId": "thread-17", "userId": "ada", "numTraces": 3}]


def test_the_bill(phoenix: Phoenix) -> None:
    """Tokens count once, failed attempts too, and the cost that Phoenix finds by its own prices is ours."""

    def bill() -> Any:
        found = phoenix.project("tokenCountTotal costSummary { total { cost tokens } }")
        # Prices are applied some seconds after the spans have come.
        return found if found["costSummary"]["total"]["tokens"] == phoenix.sent.tokens else None

    found = eventually(bill)
    assert found, phoenix.project("tokenCountTotal costSummary { total { cost tokens } }")
    assert found["tokenCountTotal"] == phoenix.sent.tokens
    assert found["costSummary"]["total"]["cost"] == pytest.approx(phoenix.sent.cost_usd, abs=1e-6)


def test_pictures(phoenix: Phoenix, tmp_path: Path) -> None:
    """Pictures of the list of traces, of the killed run and of the refused one are made for people."""
    roots = {
        span["attributes"]["stroma.run.id"]: span["context"]["trace_id"]
        for span in phoenix.spans_named("invoke_workflow support")
    }
    project = phoenix.url + f"/projects/{phoenix.project('id')['id']}"
    shoot(f"{project}/traces", "phoenix-list", tmp_path)
    for run_id, trace_id in roots.items():
        shoot(f"{project}/traces/{trace_id}", f"phoenix-{run_id}", tmp_path)
