"""What Phoenix shows of a run: a real server, asked over its API.

./dev test --framework phoenix
"""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.frameworks.backends import TREE, Sent, eventually, free_port, send_run, serving

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]

PROJECT = "seen"


class Phoenix:
    """A server of Phoenix that has received the run."""

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
        sent = asyncio.run(send_run(f"{url}/v1/traces", {}, {"openinference.project.name": PROJECT}))
        server = Phoenix(url, sent)
        eventually(lambda: len(server.spans()) == len(TREE))
        yield server


def test_the_tree(phoenix: Phoenix) -> None:
    """Nodes are under their group or run, calls under their node, and the resume is a trace of its own."""
    spans = phoenix.spans()
    names = {span["context"]["span_id"]: span["name"] for span in spans}
    assert sorted(((span["name"], names.get(span["parent_id"])) for span in spans), key=str) == TREE
    assert len({span["context"]["trace_id"] for span in spans}) == 2


def test_kinds(phoenix: Phoenix) -> None:
    """Runs, groups and nodes are of kind CHAIN, and model calls LLM; none is UNKNOWN."""
    kinds = Counter((span["name"].partition(" ")[0], span["span_kind"]) for span in phoenix.spans())
    assert kinds == {("invoke_workflow", "CHAIN"): 2, ("stroma.node", "CHAIN"): 7, ("chat", "LLM"): 6}


def test_inputs_and_outputs(phoenix: Phoenix) -> None:
    """Each run has the state that it began and ended with, as JSON; each node its own."""
    for span in phoenix.spans():
        if not span["name"].startswith("chat"):
            assert span["attributes"]["input.mime_type"] == "application/json"
            json.loads(span["attributes"]["input.value"])
    outputs = {
        span["name"]: json.loads(span["attributes"]["output.value"])
        for span in phoenix.spans()
        if "output.value" in span["attributes"]
    }
    assert outputs["stroma.node right"] == {"n": 1}
    resumed = next(span for span in phoenix.spans_named("invoke_workflow") if span["status_code"] != "ERROR")
    assert json.loads(resumed["attributes"]["output.value"]) == {"n": 42}


def test_errors(phoenix: Phoenix) -> None:
    """The node that failed for good and its run are errors; attempts that were tried again are none."""
    errors = sorted(span["name"] for span in phoenix.spans() if span["status_code"] == "ERROR")
    assert errors == ["invoke_workflow triage", "stroma.node last"]


def test_the_session_and_the_user(phoenix: Phoenix) -> None:
    """The run and its resume are one session, with the user; every span has them, the client's too."""
    for span in phoenix.spans():
        assert span["attributes"]["session.id"] == "thread-17", span["name"]
        assert span["attributes"]["user.id"] == "ada", span["name"]
    sessions = phoenix.project("sessions(first: 10) { edges { node { sessionId userId numTraces } } }")[
        "sessions"
    ]
    assert [edge["node"] for edge in sessions["edges"]] == [
        {"sessionId": "thread-17", "userId": "ada", "numTraces": 2}
    ]


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
