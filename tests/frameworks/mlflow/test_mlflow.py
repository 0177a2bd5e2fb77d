"""What MLflow shows of a run: a real server, asked through its client.

./dev test --framework mlflow
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from tests.frameworks.backends import TREE, Sent, eventually, free_port, send_run, serving

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]


class Server:
    """A server of MLflow that has received the run."""

    def __init__(self, url: str, sent: Sent) -> None:
        self.url, self.sent = url, sent

    def traces(self) -> list[Any]:
        """Return the run and its resume."""
        mlflow.set_tracking_uri(self.url)
        found: Any = mlflow.search_traces(locations=["0"], return_type="list")
        return sorted(found, key=lambda trace: trace.info.request_time)

    def spans(self) -> list[Any]:
        return [span for trace in self.traces() for span in trace.data.spans]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home: Path = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--artifacts-destination", f"{home}/files"]
    with serving("mlflow", "server", *options, *store, home=home, ready=f"{url}/health"):
        sent = asyncio.run(send_run(f"{url}/v1/traces", {"x-mlflow-experiment-id": "0"}, {}))
        found = Server(url, sent)
        eventually(lambda: len(found.spans()) == len(TREE))
        yield found


def test_the_tree(server: Server) -> None:
    """Nodes are under their group or run, calls under their node, and the resume is a trace of its own."""
    spans = server.spans()
    names = {span.span_id: span.name for span in spans}
    assert sorted(((span.name, names.get(span.parent_id)) for span in spans), key=str) == TREE
    assert len(server.traces()) == 2


def test_kinds(server: Server) -> None:
    """Runs, groups and nodes are of type CHAIN, and model calls LLM; the client's own is what the client
    says."""
    kinds = Counter((span.name.partition(" ")[0], span.span_type) for span in server.spans())
    assert kinds == {
        ("invoke_workflow", "CHAIN"): 2,
        ("stroma.node", "CHAIN"): 7,
        ("chat", "LLM"): 5,
        ("chat", "CHAT_MODEL"): 1,
    }


def test_inputs_and_outputs(server: Server) -> None:
    """Each trace has the state that its run began and ended with; each node its own."""
    first, resumed = server.traces()
    assert json.loads(first.info.request_preview) == {"n": 0}
    assert json.loads(resumed.info.response_preview) == {"n": 42}
    (right,) = [span for span in server.spans() if span.name == "stroma.node right"]
    assert (right.inputs, right.outputs) == ({"n": 0}, {"n": 1})


def test_errors(server: Server) -> None:
    """The node that failed for good and its run are errors; attempts that were tried again are none."""
    assert [trace.info.state.value for trace in server.traces()] == ["ERROR", "OK"]
    errors = sorted(span.name for span in server.spans() if span.status.status_code.value == "ERROR")
    assert errors == ["invoke_workflow triage", "stroma.node last"]


def test_the_session_and_the_user(server: Server) -> None:
    """The run and its resume are of one session and user."""
    for trace in server.traces():
        metadata = trace.info.trace_metadata
        assert (metadata["mlflow.trace.session"], metadata["mlflow.trace.user"]) == ("thread-17", "ada")


def test_the_bill(server: Server) -> None:
    """Tokens count once, failed attempts too, and the cost that MLflow finds by its own prices is ours."""
    tokens, cost = 0, 0.0
    for trace in server.traces():
        tokens += json.loads(trace.info.trace_metadata.get("mlflow.trace.tokenUsage", "{}")).get(
            "total_tokens", 0
        )
        cost += json.loads(trace.info.trace_metadata.get("mlflow.trace.cost", "{}")).get("total_cost", 0.0)
    assert tokens == server.sent.tokens
    assert cost == pytest.approx(server.sent.cost_usd, abs=1e-6)
