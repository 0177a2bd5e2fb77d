"""kill -9 at random instants while a map works through many items: each is committed once."""

import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.chaos import items
from tests.kit import ended, start_python
from tests.shared_stores import ON_SERVERS

HELPER = Path(__file__).with_name("sequence_kill_helper.py")
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


def test_killed_in_the_last_node_of_an_item(tmp_path: Path) -> None:
    """After a SIGKILL in the third node of item 17, its first two are not called again, nor any ended one."""
    side = tmp_path / "side"

    def run(status: int) -> str:
        return ended(start_python(HELPER, tmp_path / "runs.db", side), status)

    run(-signal.SIGKILL)
    before = Counter(side.read_text().splitlines())
    assert before["check 17"] == 1
    assert "classify 29" not in before
    assert run(0) == f"RESUMED {list(range(30))}\n"
    calls = Counter(side.read_text().splitlines())
    assert (calls["classify 17"], calls["draft 17"], calls["check 17"]) == (1, 1, 2)
    # Of the four items in flight, each may have been at one node that was not committed.
    twice = [call for call, count in calls.items() if count == 2]
    assert len({call.split()[1] for call in twice}) == len(twice) <= 4
    assert (len(calls), max(calls.values())) == (90, 2)


@pytest.mark.parametrize("server", ON_SERVERS)
def test_killed_on_a_server(server: str, tmp_path: Path) -> None:
    """The same on a server, with fewer items."""
    from tests.chaos.servers import served

    with served(server) as (url, _):
        where: Any = url
        figures = items.one_round(where, tmp_path, 1200, server, 1.5)
    assert figures.broken == []
    assert figures.commits == 1200
