"""Figures of the overview."""

import pytest

from stroma.checkpoint.records import Tally, digits_seconds, duration_digits
from stroma.ui.overview import Overview


@pytest.mark.parametrize(
    ("ns", "seconds"), [(0, 0), (7, 7e-9), (12, 12e-9), (1_234_567_890, 1.2), (999_999_999, 0.99)]
)
def test_durations_to_two_digits(ns: int, seconds: float) -> None:
    """A duration is summed up by its first two digits."""
    assert digits_seconds(duration_digits(ns)) == pytest.approx(seconds)


def test_the_percentiles_of_slow_nodes() -> None:
    """Slow nodes have p50 and p95 over pipelines, classes and time, to two digits, the slowest p95 first."""

    def tallies(node_id: str, *runs: tuple[int, int]) -> list[Tally]:
        return [
            Tally(
                bucket,
                "p",
                node_id,
                None,
                None,
                count,
                0,
                0,
                0,
                ms * count * 10**6,
                ms * 10**6,
                duration_digits(ms * 10**6),
            )
            for bucket, (ms, count) in enumerate(runs)
        ]

    slow, steady = Overview.of(
        [*tallies("steady", (80, 100)), *tallies("slow", (10, 93), (4321, 6), (9000, 1))]
    ).slowest
    assert (slow.name, steady.name) == ("slow", "steady")
    assert [slow.quantile(part) for part in (0.5, 0.93, 0.95, 1.0)] == [0.01, 0.01, 4.3, 9.0]
    assert [steady.quantile(part) for part in (0.5, 0.95)] == [0.08, 0.08]
