"""Asking for runs and comparing them: `runs` with filters, `show` with states, `diff`, `resume --dry-run`."""

import json
import re

import pytest

GOOD = '{"start": 1}'
FAILING = {
    "SECOND": "current_node().report_usage(input_tokens=7, model='gpt-4o-mini'); raise TimeoutError('too "
    "slow')"
}
#: What a terminal would obey, in every place where a store can hold text.
EVIL = "\x1b[2J\x1b]0;title\x07\r\x9b31m"


@pytest.fixture
def filled(any_url, inside, monkeypatch):
    """A store of every kind with two runs that completed and one that failed, each with tags."""
    monkeypatch.setenv("STROMA_DB", any_url)
    assert (
        inside(
            "run", "sums.py:pipeline", GOOD, "--run-id", "a", "--tag", "nightly", "--tag", "customer=1", "-q"
        ).code
        == 0
    )
    assert (
        inside("run", "sums.py:pipeline", GOOD, "--run-id", "b", "--tag", "nightly", "-q", env=FAILING).code
        == 1
    )
    assert inside("run", "sums.py:pipeline", '{"start": 5}', "--run-id", "c", "-q").code == 0
    return any_url


def ids(done):
    assert done.code == 0, done
    return [run["run_id"] for run in json.loads(done.out)["runs"]]


def test_runs_are_asked_for(filled, inside, fails):
    """`runs` gives those of which all that is asked holds, on every store; the cause of a failure is told
    with it."""
    for words, result in (
        ([], ["c", "b", "a"]),
        (["--failed"], ["b"]),
        (["--tag", "nightly"], ["b", "a"]),
        (["--tag", "nightly", "--status", "completed"], ["a"]),
        (["--status", "completed", "--status", "PARTIAL", "--limit", "2"], ["c", "b"]),
        (["--since", "1h"], ["c", "b", "a"]),
        (["--since", "0s"], []),
        (["--class", "recoverable"], ["b"]),
        (["--class", "TERMINAL"], []),
        (["--node", "second"], ["b"]),
        (["--search", "TOO SLOW"], ["b"]),
        (["--search", "sums", "--tag", "customer=1"], ["a"]),
        (["--pipeline", "other"], []),
    ):
        assert ids(inside("runs", "--json", *words)) == result, words
    (run,) = json.loads(inside("runs", "--json", "--failed").out)["runs"]
    assert run["tags"] == ["nightly"]
    assert run["cause"] == {
        "node_id": "second",
        "position": 1,
        "branch": "",
        "attempt": 2,
        "class": "RECOVERABLE",
        "reason": "timeout",
        "error_type": "TimeoutError",
        "message": "too slow",
    }
    assert "no run matches" in inside("runs", "--tag", "none").err
    fails(inside("runs", "--failed", "--status", "failed"), 2, "pass one of them")
    fails(inside("runs", "--since", "yesterday"), 2, "is not a time span")
    fails(inside("run", "sums.py:pipeline", GOOD, "--tag", "x" * 201), 2, "--tag", "at most 200")


def test_show_has_states(filled, inside, fails):
    """--input and --output print one JSON value for one attempt, and of several whose each is; filters choose
    attempts."""
    assert json.loads(inside("show", "a", "--node", "second", "--input").out) == {"n": 2}
    assert json.loads(inside("show", "a", "--node", "first", "--input").out) == {"n": 1}
    assert json.loads(inside("show", "a", "--node", "second", "--output").out) == {"n": 4}
    done = inside("show", "b", "--node", "second", "--attempt", "2", "--output")
    assert (done.code, done.out) == (4, "")
    assert "it committed nothing" in done.err
    several = inside("show", "a", "--input", "--output").out
    assert re.findall(r"^# (.*)$", several, re.MULTILINE) == [
        f"{at} {name}, attempt 1: {what}"
        for at, name in enumerate(("first", "second", "third"))
        for what in ("input", "output")
    ]
    data = json.loads(inside("show", "b", "--json", "--attempt", "1", "--input", "--output").out)["attempts"]
    assert [(one["node_id"], one["input"], one["output"]) for one in data] == [
        ("first", {"n": 1}, {"n": 2}),
        ("second", {"n": 2}, None),
    ]
    assert data[1]["idempotency_key"] == "b:1:1:"
    fails(
        inside("show", "a", "--node", "nope"),
        4,
        "has no attempt of node 'nope'",
        "its nodes are: first, second, third",
    )
    fails(inside("show", "a", "--attempt", "7"), 4, "has no attempt 7")


def test_show_has_rejected_outputs(any_url, stroma, inside, monkeypatch):
    """show prints what broke its contract beside each complaint; --rejected prints it as JSON, export has it,
    redact hides it."""
    monkeypatch.setenv("STROMA_DB", any_url)
    stroma.file(
        "broken.py",
        """
        from sums import *
        class Total(BaseModel):
            lines: list[dict[str, int]]
            name: str
        async def breaks(state):
            return {"lines": [{"price": "many <b>"}], "other": "x"}
        def hide(state):
            return {name: "hidden" for name in state}
        nodes = [node("first", add_one, Count), node("total", breaks, Sum, Total)]
        pipeline = Pipeline("broken", nodes, config=RunConfig(contract_retries={"total": 4}))
        private = Pipeline("broken", nodes, config=RunConfig(redact=hide))
    """,
    )
    assert inside("run", "broken.py:pipeline", GOOD, "--run-id", "x", "-q").code == 1
    shown = inside("show", "x").out
    parts = shown.split("rejected output of total at 1, attempt ")
    assert [part[0] for part in parts[1:]] == ["3", "4", "5"]
    assert (
        '  lines.0.price: Input should be a valid integer, unable to parse string as an integer; got "many '
        '<b>"\n' in parts[1]
    )
    assert "  name: Field required\n" in parts[1]
    value = {"lines": [{"price": "many <b>"}], "other": "x"}
    alone = json.loads(inside("show", "x", "--node", "total", "--attempt", "2", "--rejected").out)
    assert (alone["value"], alone["cut"]) == (value, False)
    done = inside("show", "x", "--node", "first", "--rejected")
    assert (done.code, done.out) == (4, "")
    assert "no rejected output is stored" in done.err
    data = json.loads(inside("show", "x", "--rejected", "--json").out)["attempts"]
    assert [one.get("rejected") for one in data] == [None, *[alone] * 5]
    data = json.loads(inside("export", "x").out)["attempts"]
    assert [one.get("rejected") for one in data] == [None, *[alone] * 5]
    assert "rejected" not in inside("export", "x", "--no-states").out
    assert "many <b>" not in inside("export", "x", "--format", "otlp").out
    page = inside("export", "x", "--format", "html").out
    assert "<td><code>&quot;many &lt;b&gt;&quot;</code></td>" in page
    for words in (
        ["show", "x"],
        ["show", "x", "--rejected"],
        ["export", "x"],
        ["export", "x", "--format", "html"],
    ):
        done = inside(*words, "--redact", "broken.py:private")
        assert (done.code, "many" in done.out) == (0, False), words


def test_show_as_a_tree(stroma, inside):
    """--tree draws groups and their children, --timing says when each began, and how long a retry waited."""
    stroma.file(
        "groups.py",
        """
        from sums import *
        async def slow(state):
            await asyncio.sleep(0.02)
            return {"n": 1}
        async def flaky(state):
            if current_node().attempt == 1:
                raise TimeoutError("again")
            return {"n": 2}
        leaf = lambda name: node(name, slow)
        inner = parallel(leaf("x"), leaf("y"))
        pipeline = Pipeline("tree", [node("begin", add_one, Count), parallel(inner, leaf("z")),
                                     node("flaky", flaky)],
                            config=RunConfig(policy_map=quick))
    """,
    )
    assert inside("run", "groups.py:pipeline", GOOD, "--run-id", "t", "-q").code == 0
    lines = inside("show", "t", "--tree", "--timing").out.splitlines()
    table = lines[lines.index("") + 1 :]
    assert [line[: line.index("  1  ")].rstrip() for line in table[1:7]] == [
        "0      begin",
        "1      parallel(parallel(x, y), z)",
        "1.0    ├─ parallel(x, y)",
        "1.0.0  │  ├─ x",
        "1.0.1  │  └─ y",
        "1.1    └─ z",
    ]
    assert re.search(r"BEGAN +WAITED +TIME ", table[0])
    assert re.search(r"^2 +flaky +2 +success +\+\d\.\d{3} s +\d\.\d\d s +\d\.\d\d s", table[8])


def test_show_has_the_nodes_of_each_item(stroma, inside):
    """`show` lists the nodes of a map with several below their item, and `show --input` has the input of each
    of them."""
    stroma.file(
        "steps.py",
        """
        from sums import *
        class Counts(BaseModel):
            counts: list[Count]
        async def more(state):
            return {"n": state.n + 10}
        pipeline = Pipeline("steps", [map_over("counts", [node("more", more), node("twice", double)],
                                               into="done")],
                            config=RunConfig(policy_map=quick))
    """,
    )
    argument = '{"counts": [{"n": 1}, {"n": 2}]}'
    done = inside("run", "steps.py:pipeline", argument, "--run-id", "s")
    assert done.code == 0, done.err
    lines = inside("show", "s", "--tree", "--unfold").out.splitlines()
    table = lines[lines.index("") + 1 :]
    assert [line[: line.index("  1  ")].rstrip() for line in table[1:8]] == [
        "0      map_over(counts, [more, twice])",
        "0.0    ├─ [more, twice]",
        "0.0.0  │  ├─ more",
        "0.0.1  │  └─ twice",
        "0.1    └─ [more, twice]",
        "0.1.0     ├─ more",
        "0.1.1     └─ twice",
    ]
    twice = inside("show", "s", "--node", "twice", "--input", "--unfold")
    states = re.findall(r'^# (\S+)|"n": (\d+)', twice.out, re.MULTILINE)
    assert states == [("0.0.1", ""), ("", "11"), ("0.1.1", ""), ("", "12")]
    graph = json.loads(inside("graph", "steps.py:pipeline", "--format", "json").out)
    assert [(one["node_id"], one["kind"]) for one in graph["nodes"]][1:] == [
        ("map_over(counts, [more, twice]) into done", "map_over"),
        ("[more, twice]", "sequence"),
        ("more", "node"),
        ("twice", "node"),
    ]
    checked = inside("check", "steps.py:pipeline", "--against", "s")
    assert checked.code == 0, checked.out


def test_timing_shows_how_long_functions_ran_where_a_group_also_waited(stroma, inside):
    """`show --timing` has the column FUNCTIONS if a group took longer than its functions."""
    stroma.file(
        "waits.py",
        """
        from sums import *
        async def flaky(state):
            if current_node().attempt == 1:
                raise TimeoutError("again")
            return {"n": 2}
        pipeline = Pipeline("waits", [node("begin", add_one, Count),
                                      parallel(node("flaky", flaky), node("y", double))],
                            config=RunConfig(policy_map=quick))
    """,
    )
    assert inside("run", "waits.py:pipeline", GOOD, "--run-id", "w", "-q").code == 0
    lines = inside("show", "w", "--tree", "--timing").out.splitlines()
    table = lines[lines.index("") + 1 :]
    assert re.search(r"BEGAN +WAITED +TIME +FUNCTIONS", table[0])
    assert re.search(r"parallel\(flaky, y\) .* \d\.\d\d s +\d\.\d\d s", table[2])


def test_a_narrow_terminal_shows_what_was_asked_for(stroma, inside, monkeypatch):
    """At 80 columns `show --timing` has the times, and no line is wider than the terminal, the command to
    resume included."""
    long = "stop_after_the_first_page_was_read_and_nothing_else"
    stroma.file(
        "long.py",
        f"""
        from sums import *
        pipeline = Pipeline("{long}", [node("first", add_one, Count),
                                       parallel(node("classify", double), node("risk", last))],
                            config=RunConfig(policy_map=quick))
    """,
    )
    fails = {"SECOND": "raise TimeoutError('the provider did not answer within 30 s')"}
    assert inside("run", "long.py:pipeline", GOOD, "--run-id", "t", "-q", env=fails).code == 1
    monkeypatch.setattr("stroma.cli.output.Stream.is_terminal", True)
    monkeypatch.setattr("stroma.cli.output.Stream.size", (80, 24))
    done = inside("show", "t", "--timing")
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in (done.out + done.err).splitlines()]
    assert any("BEGAN" in line and "TIME" in line for line in lines), lines
    assert any(line.startswith("resume with:") for line in lines)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("view", [(), ("--tree",)])
def test_the_line_of_a_map_sums_the_nodes_of_a_sequence(stroma, inside, view):
    """An item counts as retried if a node inside it was, and as failed if its failure was collected."""
    stroma.file(
        "turns.py",
        """
        from sums import *
        class Nums(BaseModel):
            nums: list[int]
        tries = {}
        async def shaky(state):
            tries[state.n] = tries.get(state.n, 0) + 1
            if state.n < 3 and tries[state.n] == 1:
                raise ConnectionError("lost")
            if state.n == 4:
                raise ContractViolation("shaky", "output", {}, ["never"])
            return {"n": state.n}, 10, 5, "gpt-4o-mini"
        async def final(state):
            return {"n": state.n}, 100, 0, "gpt-4o-mini"
        turns = [node("shaky", shaky), node("final", final)]
        items = map_over("nums", turns, into="sums", on_item_failure="collect")
        pipeline = Pipeline("turns", [items], config=RunConfig(policy_map=quick))
    """,
    )
    given = json.dumps({"nums": list(range(6))})
    assert inside("run", "turns.py:pipeline", given, "--run-id", "t", "-q").code == 0
    *_, folded, failed = inside("show", "t", *view).out.splitlines()
    # 5 items of 115 tokens each; the other one broke its contract, which is not retried.
    assert re.match(r"0\.0 .*\[shaky, final\] x6 .* 1 failed .* 575  \$0\.000097 ", folded)
    assert folded.endswith("6 items: 5 ok, 3 retried, 1 failed")
    assert re.match(r"0\.4 .*\[shaky, final\] +2 +collected", failed)


def test_show_folds_the_loops_of_a_flow(stroma, inside):
    """Repeated calls of a node in a flow are one line with the first failures; with --unfold or --node each
    has one."""
    stroma.file(
        "loop.py",
        """
        from sums import *
        again = node("again", last)
        async def flaky(state):
            if state.n == 1:
                raise ValueError("one")
            return {"n": state.n}, 10, 5, "gpt-4o-mini"
        flaky = node("flaky", flaky)
        @stroma_flow("loop", input=Sum, output=Sum)
        async def loop(flow, state):
            for n in range(3):
                await flow.step(again, Sum(n=n))
                try:
                    await flow.step(flaky, Sum(n=n))
                except StepFailed:
                    pass
            await flow.sleep(seconds=0.01)
            return state
        pipeline = Pipeline("loop", [loop], config=RunConfig(policy_map=quick))
    """,
    )
    assert inside("run", "loop.py:pipeline", '{"n": 1}', "--run-id", "l", "-q").code == 0

    def table(*options: str) -> list[str]:
        lines = inside("show", "l", *options).out.splitlines()
        return lines[lines.index("") + 2 :]

    tree = table("--tree")
    assert [re.split(r"  +", line)[1] for line in tree[:3]] == ["loop", "├─ again x3", "├─ flaky x3"]
    assert re.match(r"0.again#0 +├─ again x3 +success ", tree[1])
    assert re.match(r"0.flaky#1 +├─ flaky x3 +4 +1 failed +.* 30 ", tree[2])
    assert tree[2].endswith("3 calls: 2 ok, 0 retried, 1 failed")
    assert re.match(r"0.flaky#3 +│  └─ flaky +2 +failure .* ValueError: one$", tree[3])
    assert re.match(r"0.!sleep#0 +└─ sleep until \S+ +slept$", tree[4])
    assert len(tree) == 5
    assert len(table()) == 4
    assert len(table("--unfold")) == 8
    assert len(table("--tree", "--unfold")) == 9
    assert [line.split()[0] for line in table("--tree", "--node", "again")] == [
        "0",
        "0.again#0",
        "0.again#2",
        "0.again#4",
    ]


def test_graph_of_recorded_runs(stroma, inside, fails):
    """`stroma graph FILE:flow --from-runs` draws the steps of all runs of a flow, and says so if there are
    none."""
    stroma.file(
        "loop.py",
        """
        from sums import *
        again = node("again", last)
        @stroma_flow("loop", input=Sum, output=Sum)
        async def loop(flow, state):
            for n in range(state.n):
                await flow.step(again, Sum(n=n))
            return state
    """,
    )
    fails(inside("graph", "loop.py:loop", "--from-runs"), 3, "no such database")
    assert inside("run", "sums.py:pipeline", GOOD, "--run-id", "s", "-q").code == 0
    fails(inside("graph", "loop.py:loop", "--from-runs"), 4, "no runs of 'loop'")
    for n in (2, 3):
        assert inside("run", "loop.py:loop", f'{{"n": {n}}}', "-q").code == 0
    drawn = inside("graph", "loop.py:loop", "--from-runs", "--format", "mermaid").out
    assert drawn.splitlines() == [
        "flowchart TD",
        '    start(["loop: 2 runs"])',
        '    n0["again<br/>5 calls"]',
        "    start -->|2| n0",
        "    n0 -->|3| n0",
        '    end_COMPLETED(["COMPLETED"])',
        "    n0 -->|2| end_COMPLETED",
    ]
    data = json.loads(inside("graph", "loop.py:loop", "--from-runs", "--format", "json").out)
    assert (data["schema"], data["runs"]) == ("stroma.run_graph/1", 2)
    assert data["nodes"] == [{"path": ["again"], "kind": "node", "calls": 5, "attempts": 5, "failed": 0}]
    assert inside("graph", "loop.py:loop", "--from-runs", "--format", "svg").out.startswith("<svg")
    assert "again" not in inside("graph", "loop.py:loop", "--format", "mermaid").out


@pytest.mark.core
def test_diff(filled, inside, fails):
    """diff tells two runs apart node by node and field by field, and ends with 6 if they differ."""
    done = inside("diff", "a", "b")
    assert done.code == 6
    assert re.search(r"\n1  second  .*\n  ~ outcome: \"success\" -> \"failure\"\n", done.out)
    assert re.search(r"\n2  third  only in A\n", done.out)
    assert "\n0  first  the same" in done.out
    assert done.out.startswith(
        "different: 1 node with other attempts, outcomes or models; 1 node only in A; 1 node the same; cost $"
    )
    assert "first" not in inside("diff", "a", "b", "--only-changed").out

    data = json.loads(inside("diff", "a", "c", "--json", "--only-changed").out)
    assert (data["schema"], data["same"]) == ("stroma.diff/1", False)
    assert data["input"] == [{"path": "n", "kind": "changed", "a": 1, "b": 5}]
    assert [(n["node_id"], n["output"]) for n in data["nodes"]] == [
        ("first", [{"path": "n", "kind": "changed", "a": 2, "b": 6}]),
        ("second", [{"path": "n", "kind": "changed", "a": 4, "b": 12}]),
        ("third", [{"path": "n", "kind": "changed", "a": 4, "b": 12}]),
    ]
    same = inside("diff", "a", "a")
    assert (same.code, same.err) == (0, "the same, but for what they took and cost\n")
    assert inside("diff", "a", "b", "--node", "first").code == 0
    fails(inside("diff", "a", "b", "--node", "nope"), 4, "neither run has a node 'nope'")
    fails(inside("diff", "a", "nope"), 4, "no run whose id begins with 'nope'")


def test_a_dry_run(filled, stroma, inside, fails):
    """--dry-run says what is kept, what that saves and what would be called, and calls nothing."""
    before = stroma.calls()
    done = inside("resume", "b", "sums.py:pipeline", "--dry-run")
    assert (done.code, stroma.calls()) == (0, before)
    assert re.search(
        r"kept +1 node, in groups 0\n +0 +first +\d\.\d\d s  120 tok, \$0\.000\d+\nsaves .* 120 tok", done.out
    )
    assert done.out.endswith("calls   second, third\n")
    assert "nothing was done; resume with: stroma resume b sums.py:pipeline\n" in done.err
    data = json.loads(inside("resume", "a", "sums.py:pipeline", "--from", "third", "--dry-run", "--json").out)
    assert (data["schema"], data["saves"]["tokens"], data["calls"], data["resumable"]) == (
        "stroma.plan/1",
        135,
        ["third"],
        True,
    )
    assert [one["node_id"] for one in data["kept"]] == ["first", "second"]
    assert inside("resume", "b", "--dry-run").out.endswith("calls   second, and what follows\n")
    stroma.file(
        "changed.py",
        "from sums import *\npipeline = Pipeline('sums', [node('other', double), second, third])",
    )
    changed = inside("resume", "b", "changed.py:pipeline", "--dry-run")
    assert changed.code == 2
    assert "changed 0  first: " in changed.out
    assert "the run cannot be resumed; restore" in changed.err
    assert stroma.calls() == before
    assert inside("resume", "b", "sums.py:pipeline", "-q").code == 0


@pytest.mark.core
def test_what_a_terminal_would_obey(stroma, inside, monkeypatch, any_url):
    """Control characters in ids, tags, messages, models and states reach no terminal: they are shown
    escaped."""
    monkeypatch.setenv("STROMA_DB", any_url)
    stroma.file(
        "evil.py",
        f"""
        from sums import *
        EVIL = {EVIL!r}
        class Text(BaseModel):
            text: str = EVIL
            more: dict[str, str] = {{}}
        async def talks(state):
            return {{"text": EVIL, "more": {{EVIL: EVIL}}}}, 3, EVIL
        async def fails(state):
            raise ValueError(EVIL)
        pipeline = Pipeline(EVIL + "p", [node(EVIL + "talks", talks, Text, Text),
                                        node("fails", fails, Text, Text)],
                            config=RunConfig(policy_map=quick, tags=(EVIL,)))
    """,
    )
    run_id = "r" + EVIL
    assert inside("run", "evil.py:pipeline", "--run-id", run_id, "-q").code == 1
    assert inside("run", "evil.py:pipeline", '{"text": "x"}', "--run-id", "other", "-q").code == 1
    for words in (
        ["runs"],
        ["runs", "--json"],
        ["show", "r"],
        ["show", "r", "--tree", "--timing"],
        ["show", "r", "--json"],
        ["show", "r", "--input", "--output"],
        ["show", "r", "--rejected"],
        ["show", "r", "--rejected", "--json"],
        ["diff", "r", "other"],
        ["diff", "r", "other", "--json"],
        ["tail", "r"],
        ["tail"],
        ["tail", "r", "--json"],
        ["resume", "r", "--dry-run"],
        ["resume", "r", "evil.py:pipeline", "--dry-run"],
        ["export", "r"],
        ["export", "r", "--format", "otlp"],
        ["export", "r", "--format", "html"],
        ["runs", "--search", EVIL],
        ["runs", "--tag", EVIL],
        ["show", EVIL],
        ["run", "evil.py:pipeline", "--run-id", "third" + EVIL],
        ["resume", "r", "evil.py:pipeline"],
        ["cancel", "other"],
        ["runs", "--tag", EVIL + "none"],
        ["diff", "r", "other", "--node", EVIL],
        ["show", "r", "--node", EVIL],
    ):
        done = inside(*words)
        assert done.code in (0, 1, 2, 4, 6), (words, done)
        for text in (done.out, done.err):
            assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text), (words, text)


def test_show_folds_a_map_and_fits_the_terminal(stroma, inside, monkeypatch):
    """The items of a map are one line that counts them; on a terminal no line is wider than it."""
    stroma.file(
        "fan.py",
        """
        from sums import *
        class Nums(BaseModel):
            nums: list[int]
        class Sums(BaseModel):
            sums: list[Sum]
        tries = {}
        async def shaky(state):
            tries[state.n] = tries.get(state.n, 0) + 1
            if state.n == 7 and tries[7] == 1:
                raise ConnectionError("lost " * 40)
            return {"n": state.n}, 10, 5, "gpt-4o-mini"
        pipeline = Pipeline("fan", [map_over("nums", node("shaky", shaky), into="sums")],
                            config=RunConfig(policy_map=quick))
    """,
    )
    given = json.dumps({"nums": list(range(20))})
    assert inside("run", "fan.py:pipeline", given, "--run-id", "f", "-q").code == 0
    shown = inside("show", "f").out
    assert re.search(r"\n0.0 +shaky x20 +21 +success .* 20 items: 20 ok, 1 retried, 0 failed\n", shown)
    assert inside("show", "f", "--unfold").out.count(" shaky ") == 21
    for columns in (40, 60, 80, 120):
        text = _on_terminal(monkeypatch, inside, columns, "show", "f")
        assert max(map(len, text.splitlines())) <= columns, text
        assert "20 items: " in text
        for command in (("show", "f", "--unfold"), ("runs",), ("diff", "f", "f")):
            text = _on_terminal(monkeypatch, inside, columns, *command)
            assert max(map(len, text.splitlines())) <= columns, text


def _on_terminal(monkeypatch, inside, columns: int, *words: str) -> str:
    """Return what a command writes to a terminal of this width."""
    with monkeypatch.context() as patch:
        patch.setattr("stroma.cli.output.Stream.is_terminal", True)
        text = inside(*words, env={"COLUMNS": str(columns), "NO_COLOR": "1"}).out
    return str(text)
