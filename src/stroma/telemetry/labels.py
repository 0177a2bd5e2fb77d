"""Labels of metrics, bounded in number and length: a label with a value for each run fills up the server that stores it."""

from __future__ import annotations

from typing import Final

__all__ = ["OTHER", "BoundedLabels", "MetricLabels", "sound"]

#: Label of every value above the bound.
OTHER: Final = "other"


class BoundedLabels:
    """The values of one label: the first ``max_count`` are kept, cut to ``max_length`` characters, further ones are "other"."""

    __slots__ = ("_known", "_max_count", "_max_length")

    def __init__(self, max_count: int, max_length: int) -> None:
        self._known: dict[str, str] = {}
        self._max_count, self._max_length = max_count, max_length

    def __call__(self, value: str | None) -> str:
        """Return the label for a value; "" for None. A value that has had a label keeps it."""
        key = "" if value is None else value[: self._max_length]
        label = self._known.get(key)
        if label is None:
            if len(self._known) >= self._max_count:
                return OTHER
            label = self._known[key] = sound(key)[: self._max_length]
        return label


class MetricLabels:
    """The labels that metrics of one destination use.

    Attributes:
        pipeline: 1,000 names of pipelines.
        model: 200 names of models, which come from answers of providers.
        agent: 200 ids of nodes that are agents.
        reason: 50 reasons of failures.
        limit: 200 names of limits.
        circuit: 200 circuits; each host has one.
        dimension: 200 dimensions of budgets; a shared one has its name in front.
    """

    __slots__ = ("_places", "agent", "circuit", "dimension", "limit", "model", "pipeline", "reason")

    def __init__(self) -> None:
        self.pipeline = BoundedLabels(_MAX_PLACES, _MAX_LENGTH)
        self.model = BoundedLabels(_MAX_VALUES, _MAX_MODEL_LENGTH)
        self.agent = BoundedLabels(_MAX_VALUES, _MAX_LENGTH)
        self.reason = BoundedLabels(_MAX_REASONS, _MAX_MODEL_LENGTH)
        self.limit = BoundedLabels(_MAX_VALUES, _MAX_LENGTH)
        self.circuit = BoundedLabels(_MAX_VALUES, _MAX_LENGTH)
        self.dimension = BoundedLabels(_MAX_VALUES, _MAX_LENGTH)
        self._places: dict[tuple[str, str], tuple[str, str]] = {}

    def place(self, pipeline: str, node_id: str) -> tuple[str, str]:
        """Return the labels for a pipeline and a node of it: 1,000 pairs, then the node is "other"."""
        key = pipeline[:_MAX_LENGTH], node_id[:_MAX_LENGTH]
        labels = self._places.get(key)
        if labels is None:
            if len(self._places) >= _MAX_PLACES:
                return self.pipeline(pipeline), OTHER
            labels = self._places[key] = self.pipeline(pipeline), sound(key[1])[:_MAX_LENGTH]
        return labels


_MAX_PLACES: Final = 1000
_MAX_VALUES: Final = 200
_MAX_REASONS: Final = 50
_MAX_LENGTH: Final = 200  # characters
_MAX_MODEL_LENGTH: Final = 100


def sound(text: str) -> str:
    """Return a text that UTF-8 can encode: a lone surrogate in a label can cost a whole page of metrics."""
    return text.encode("utf-8", "backslashreplace").decode()
