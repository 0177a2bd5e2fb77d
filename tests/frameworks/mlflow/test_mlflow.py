"""What MLflow shows of an agent: a real server, asked through its client, and pictures of its pages.

./dev test --framework mlflow
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from tests.frameworks.backends import TREE, Endpoint, Sent, eventually, free_port, send_runs, serving, shoot

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]


class Server:
    """A server of MLflow that has received the runs."""

    def __init__(self, url: str, sent: Sent) -> None:
        self.url, self.sent = url, sent

    def traces(self) -> list[Any]:
        """Return the run that was killed, its fork and the refused one."""
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
        endpoint = Endpoint(f"{url}/v1/traces", {"x-mlflow-experiment-id": "0"}, {})
        found = Server(url, send_runs(endpoint, home))
        eventually(lambda: len(found.spans()) == len(TREE))
        yield found


def test_the_tree(server: Server) -> None:
    """A killed and resumed run is one tree, its fork another; nodes are under their flow, map or group."""
    spans = server.spans()
    names = {span.span_id: span.name for span in spans}
    assert sorted(((span.name, names.get(span.parent_id)) for span in spans), key=str) == TREE
    assert len(server.traces()) == 3


def test_kinds(server: Server) -> None:
    """Flows, maps, groups and nodes are of type CHAIN, model calls LLM, tools TOOL, the client's its own."""
    kinds = Counter((span.name, span.span_type) for span in server.spans())
    names = Counter(name for name, _ in TREE)

    def type_of(name: str) -> str:
        of_name = {"chat by the client": "CHAT_MODEL", "execute_tool search": "TOOL"}
        return of_name.get(name, "LLM" if name.startswith("chat") else "CHAIN")

    assert kinds == {(name, type_of(name)): count for name, count in names.items()}


def test_inputs_and_outputs(server: Server) -> None:
    """Each trace has the state that its run began and ended with; each node its own."""
    letter = {"text": "Your order left on Monday.", "version": 2, "is_good": True}
    traces = server.traces()
    for trace in traces:
        assert json.loads(trace.info.request_preview) == {"text": "Where is order 4711?"}
    assert [json.loads(trace.info.response_preview) for trace in traces[:2]] == [letter, letter]
    sent = [span for span in server.spans() if span.name == "stroma.node send"]
    assert [(span.inputs, span.outputs) for span in sent] == [(letter, letter)] * 2


def test_errors(server: Server) -> None:
    """The node whose key was refused and its run are errors; retried attempts and killed runs are not."""
    assert [trace.info.state.value for trace in server.traces()] == ["OK", "OK", "ERROR"]
    errors = sorted(span.name for span in server.spans() if span.status.status_code.value == "ERROR")
    assert errors == ["invoke_workflow support", "stroma.node classify"]


def test_the_session_and_the_user(server: Server) -> None:
    """The runs are of one session and user."""
    for trace in server.traces():
        metadata = trace.info.trace_metadata
        assert (metadata["mlflow.trace.session"], metadata["mlflow.trace.user"]) == ("thread-17", "ada")


def test_the_bill(server: Server) -> None:
    """Tokens count once, failed attempts too, and the cost that MLflow finds by its own prices is ours."""
    tokens, cost = 0, 0.0
    for trace in server.traces():
        about = trace.info.trace_metadata
        tokens += json.loads(about.get("mlflow.trace.tokenUsage", "{}")).get("total_tokens", 0)
        cost += json.loads(about.get("mlflow.trace.cost", "{}")).get("total_cost", 0.0)
    assert tokens == server.sent.tokens
    assert cost == pytest.approx(server.sent.cost_usd, abs=1e-6)


def test_pictures(server: Server, tmp_path: Path) -> None:
    """Pictures of the list of traces, of the killed run and of the refused one are made for people."""
    traces = f"{server.url}/#/experiments/0/traces"
    shoot(traces, "mlflow-list", tmp_path)
    for name, trace in zip(("r-1", "fork", "refused"), server.traces(), strict=True):
        shoot(f"{traces}?selectedEvaluationId={trace.info.trace_id}", f"mlflow-{name}", tmp_path)
