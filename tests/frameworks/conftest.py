"""Tests against the real frameworks, each in an environment of its own: ``./dev test --framework NAME``."""

import importlib
import os
import pathlib
import socket
from typing import Any

import pytest

pytest.register_assert_rewrite("tests.frameworks.contract")

_HERE = pathlib.Path(__file__).parent
_WANTED = os.environ.get("STROMA_TEST_FRAMEWORK")
#: What ./dev has made an environment for; the others are not there, and nothing is skipped in silence.
collect_ignore = [str(folder) for folder in _HERE.iterdir() if folder.is_dir() and folder.name != _WANTED]
if _WANTED is None:
    collect_ignore.append(str(_HERE / "test_pages.py"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is not a fake one, or telemetry of a framework, is an error and no bill."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1"):
            raise OSError(f"the tests of frameworks have no network: {address!r}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


if _WANTED is not None:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # litellm fetches its prices when it is imported.
    # Before anything is collected: without its framework, its tests fail and do not vanish.
    modules = {
        "openai_agents": "agents",
        "google_adk": "google.adk",
        "grafana": "grafana_foundation_sdk",
        "instrumented": "openinference.instrumentation",
        "llama_index": "workflows",
        "others": "smolagents",
    }
    importlib.import_module(modules.get(_WANTED, _WANTED))
