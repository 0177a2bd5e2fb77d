"""The releases of frameworks that the adapters are tested with."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from stroma._utils.distributions import installed_version, missing

#: By extra: the distribution, its lowest release, and the one below which it has to be. pyproject.toml has
#: the same.
RELEASES: Final = {
    "agent-framework": ("agent-framework-core", "1.0", "2"),
    "claude-agent-sdk": ("claude-agent-sdk", "0.2.100", "0.3"),
    "crewai": ("crewai", "1.13", "2"),
    "deepagents": ("deepagents", "0.6", "0.8"),
    "dspy": ("dspy", "2.6.27", "4"),
    "google-adk": ("google-adk", "1.39", "3"),
    "haystack": ("haystack-ai", "2.31", "4"),
    "langchain": ("langchain", "1.2.18", "2"),
    "langgraph": ("langgraph", "1.0.10", "2"),
    "litellm": ("litellm", "1.100", "2"),
    "llama-index": ("llama-index-workflows", "2.10", "3"),
    "mcp": ("mcp", "1.20", "3"),
    "openai-agents": ("openai-agents", "0.20", "0.25"),
    "pydantic-ai": ("pydantic-ai-slim", "1.107", "3"),
}
_NEEDS: Final = {"crewai": " (on Python before 3.14)"}


@contextmanager
def imports_of(extra: str) -> Iterator[None]:
    """Import a framework inside, for its adapter.

    Raises ImportError with what to install, or the releases that are supported. Warns of an installed release
    that the adapter was not tested with.
    """
    name, lowest, below = RELEASES[extra]
    try:
        yield
    except ImportError as error:
        installed = installed_version(name)
        if installed is None:
            raise missing(name, f"its adapter{_NEEDS.get(extra, '')}", extra) from error
        raise ImportError(
            f"{name} {installed} is installed, and its adapter could not import what it needs ({error}); use "
            f"{_range(extra)}, with its dependencies"
        ) from error
    installed = installed_version(name)
    if installed and not _numbers(lowest) <= _numbers(installed) < _numbers(below):
        warnings.warn(
            f"{name} {installed} is installed, and its adapter supports {_range(extra)}: calls may "
            "not be guarded; use "
            "one of these releases",
            RuntimeWarning,
            stacklevel=4,  # the import statement
        )


def _range(extra: str) -> str:
    name, lowest, below = RELEASES[extra]
    return f"{name}>={lowest},<{below}"


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release.partition("+")[0]))
