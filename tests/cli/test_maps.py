"""Maps with many items on the command line: progress, collected failures, and running those again."""

import json
import re

import pytest
from tests.cli.terminal import run_on_terminal

MANY = """
    from sums import *
    import json
    with open("in.jsonl", "w") as file:
        for n in range(int(os.environ.get("ITEMS", "300"))):
            file.write(json.dumps({"n": n}) + "\\n")

    class Nothing(BaseModel):
        pass

    async def half(state):
        called(f"half-{state.n}")
        await asyncio.sleep(float(os.environ.get("PAUSE", "0")))
        if state.n % 10 == 7 and "WELL" not in os.environ:
            raise ContractViolation("half", "output", {}, ["never"])
        return {"n": state.n // 2}, 10

    async def after(state):
        called("after")
        return {}

    pipeline = Pipeline("many", [
        map_over(JsonLines("in.jsonl"), node("half", half), into=JsonLines("out.jsonl"),
                 on_item_failure="collect"),
        node("after", after, Nothing, Nothing),
    ])
    """


def test_many_items_are_one_line(stroma, inside):
    """Of a map with many items one line has the progress, with the first failures."""
    stroma.file("many.py", MANY)
    done = inside("run", "many.py:pipeline", "{}", "--run-id", "m")
    assert done.code == 0, done.err
    assert "half[0]" not in done.err
    assert re.search(r"map_over\(in\.jsonl, half\) +items +0 of 300 items\n", done.err)
    assert re.search(r"items +300 of 300 items, 30 failed, [\d,.]+/s\n", done.err)
    failures = re.findall(r"half\[\d*7\] +FAILED +TERMINAL", done.err)
    assert len(failures) == 20
    assert "\r" not in done.err + done.out
    assert (
        "30 items failed, the run continued without them; run them again: stroma resume m many.py:pipeline "
        "--retry-failed" in done.err
    )
    assert len((stroma.home / "out.jsonl").read_text().splitlines()) == 270


def test_the_item_that_stopped_a_map_is_named(stroma, inside):
    """Of items that failed alike, the message names the one without a retry left."""
    stroma.file(
        "alike.py",
        """
        from sums import *
        class Nums(BaseModel):
            nums: list[int]
        class Busy(Exception):
            status_code = 503
        async def half(state):
            error = Busy("overloaded")
            if state.n == 0:
                error.response = type("Response", (), {"headers": {"retry-after": "5"}, "status_code": 503})
            raise error
        retry = {"RECOVERABLE": FailurePolicy(max_retries=2, backoff_seconds=0)}
        pipeline = Pipeline("alike", [map_over("nums", node("half", half), into="nums")],
                            config=RunConfig(policy_map=retry))
        """,
    )
    done = inside("run", "alike.py:pipeline", '{"nums": [0, 1]}', "-q")
    assert "node 'half' (at 0.1, attempt 3) in map_over(nums, half): RECOVERABLE" in " ".join(
        done.err.split()
    )


def test_failed_items_are_run_again(stroma, inside, fails):
    """resume leaves failed items as they are; --retry-failed runs just those and what follows."""
    stroma.file("many.py", MANY)
    done = inside("run", "many.py:pipeline", "{}", "--run-id", "m", "--json", "-q")
    assert json.loads(done.out)["totals"]["failed_items"] == 30
    assert json.loads(done.out)["totals"]["attempts"] == 302
    entry = inside("resume", "m", "many.py:pipeline", "--json", "-q", env={"WELL": "1"})
    assert (entry.code, json.loads(entry.out)["totals"]["failed_items"]) == (0, 30), entry.err
    assert len(stroma.calls()) == 301
    planned = inside("resume", "m", "many.py:pipeline", "--dry-run", "--json")
    assert (planned.code, json.loads(planned.out)["resumable"]) == (0, True), planned
    again = inside("resume", "m", "many.py:pipeline", "--retry-failed", "--json", env={"WELL": "1"})
    assert (again.code, json.loads(again.out)["totals"]["failed_items"]) == (0, 0), again.err
    assert re.search(r"items +300 of 300 items", again.err)
    assert sorted(stroma.calls()[301:]) == sorted(["after", *(f"half-{n}" for n in range(7, 300, 10))])
    assert len((stroma.home / "out.jsonl").read_text().splitlines()) == 300
    fails(
        inside("resume", "m", "many.py:pipeline", "--retry-failed", "--from", "after"),
        2,
        "--retry-failed and --from exclude each other",
    )


def test_few_items_are_told_one_by_one(stroma, inside):
    """A map with few items is told item by item."""
    stroma.file("many.py", MANY)
    done = inside("run", "many.py:pipeline", "{}", env={"ITEMS": "5"})
    assert done.code == 0, done.err
    assert re.search(r"    half\[4\] +ok ", done.err)
    assert " items " not in done.err


def test_lines_name_the_item(stroma, inside):
    """Each line of a node in an item has the index of the item, also if a node was restored."""
    stroma.file(
        "turns.py",
        """
        from sums import *
        class Nums(BaseModel):
            nums: list[int]
        async def load(state):
            return state
        async def read(state):
            called(f"read-{state.n}")
            return {"n": state.n}
        async def rate(state):
            if state.n == 8 and "WELL" not in os.environ:
                raise ContractViolation("rate", "output", {}, ["never"])
            return {"n": state.n}
        turns = map_over("nums", [node("read", read), node("rate", rate)], into="sums", max_concurrency=1)
        pipeline = Pipeline("turns", [node("load", load, Nums, Nums), turns])
    """,
    )

    def names(lines: str) -> list[str]:
        return re.findall(r"^\S+ +(\S.*?)  +(?:start|ok|restored|FAILED)\b", lines, re.MULTILINE)

    done = inside("run", "turns.py:pipeline", '{"nums": [7, 8]}', "--run-id", "t")
    assert done.code == 1, done.err
    group = "map_over(nums, [read, rate])"
    first = ["read[0]", "rate[0]", "[read, rate][0]"]
    second = [name.replace("[0]", "[1]") for name in first]
    assert names(done.err) == ["load", "load", group, *first, *second, group]
    again = inside("resume", "t", "turns.py:pipeline", env={"WELL": "1"})
    assert again.code == 0, again.err
    rest = ["[read, rate][0]", "read[1]", "rate[1]", "[read, rate][1]"]
    assert names(again.err) == ["load", group, *rest, group]
    assert stroma.calls() == ["read-7", "read-8"]


@pytest.mark.slow
def test_on_a_terminal_a_map_is_a_line_with_a_bar(stroma):
    """On a terminal a map is one line of the table: done, failed, rate and time left; then it is folded."""
    stroma.file("many.py", MANY)
    seen: list[str] = []
    code, emulator, written = run_on_terminal(
        ["stroma", "run", "many.py:pipeline", "{}"],
        stroma.home,
        stroma.env | {"PAUSE": "0.1"},
        columns=100,
        at=lambda _process, emulator: seen.append(emulator.text),
    )
    assert code == 0, written
    assert any(re.search(r"█+░+ \d+/300 \d+ failed \d[\d.]*/s \d+s left", text) for text in seen), seen[-3:]
    assert "300 items: 30 failed, 270 ok" in emulator.text
    assert emulator.text.count("TRY") == 1
