"""kill -9 at random instants while a map works through many items: each is committed once."""

import time
from pathlib import Path
from typing import Any

import pytest
from tests.chaos import items
from tests.shared_stores import ON_SERVERS

ITEMS = 5000


@pytest.mark.nightly
def test_killed_at_random_each_item_is_committed_once(tmp_path: Path) -> None:
    """A map over 5,000 items that is killed until it is done commits each once, in order."""
    # How long a whole run takes here sets the range of instants.
    measure = tmp_path / "measure"
    measure.mkdir()
    (measure / "in.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(ITEMS)))
    process = items.start(f"sqlite:///{measure}/runs.db", measure)
    started = time.perf_counter()
    assert process.communicate()[0].split()[0] == b"5", process.returncode
    whole = time.perf_counter() - started

    kills = 0
    for number in range(4):
        folder = tmp_path / str(number)
        folder.mkdir()
        figures = items.one_round(f"sqlite:///{folder}/runs.db", folder, ITEMS, str(number), 0.5 * whole)
        assert figures.broken == []
        assert figures.commits == ITEMS
        kills += figures.kills
    assert kills >= 4


@pytest.mark.parametrize("server", ON_SERVERS)
def test_killed_on_a_server(server: str, tmp_path: Path) -> None:
    """The same on a server, with fewer items."""
    from tests.chaos.servers import served

    with served(server) as (url, _):
        where: Any = url
        figures = items.one_round(where, tmp_path, 800, server, 1.5)
    assert figures.broken == []
    assert figures.commits == 800
