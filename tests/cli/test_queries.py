"""Inspecting runs: `runs`, `show`, `diff`, `resume --dry-run` and `graph`, with golden files."""

import json
import re

import pytest
from tests.cli.conftest import GOOD

from stroma.cli.resume_plan import Incompatibility, _change_lines

SLOW = "current_node().report_usage(input_tokens=7, model='gpt-4o-mini'); raise TimeoutError('too slow')"
#: What a terminal would obey, in every place where a store can hold text.
EVIL = "\x1b[2J\x1b]0;title\x07\r\x9b31m"


@pytest.fixture
def filled(any_url, ran, monkeypatch):
    """A store of every kind with two runs that completed and one that failed, each with tags."""
    monkeypatch.setenv("STROMA_DB", any_url)
    ran("a", "--tag", "nightly", "--tag", "customer=1")
    ran("b", "--tag", "nightly", code=1, SECOND=SLOW)
    ran("c", given='{"start": 5}')
    return any_url


@pytest.fixture
def shows(stroma, ran, golden):
    """Run a pipeline of this code, and compare what commands print of the run "x" with a golden file."""

    def check(name, text, *lines, given=GOOD, **options):
        stroma.file("case.py", text)
        ran("x", target="case.py:pipeline", given=given, **options)
        golden(name, *lines)

    return check


def test_runs_are_filtered(filled, inside, fails):
    """`runs` lists the runs that every filter matches, on every store."""
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
        done = inside("runs", "--json", *words)
        assert (done.code, [run["run_id"] for run in json.loads(done.out)["runs"]]) == (0, result), words
    assert "; list all: stroma runs" in inside("runs", "--tag", "none").err
    fails(inside("runs", "--failed", "--status", "failed"), 2, "pass one of them")
    fails(inside("runs", "--since", "yesterday"), 2, "is not a time span")
    fails(inside("run", "sums.py:pipeline", GOOD, "--tag", "x" * 201), 2, "--tag", "at most 200")


@pytest.mark.core
def test_totals_say_if_more_runs_match(filled, inside, monkeypatch):
    """The totals of `runs` have a plus if further runs match that were not counted, and only then."""
    monkeypatch.setattr("stroma.cli.commands.runs._MAX_COUNTED", 2)
    for limit, totals in (("1", "2+ runs: "), ("2", "2+ runs: "), ("3", "3 runs: "), ("4", "3 runs: ")):
        assert totals in inside("runs", "--limit", limit).err
    assert "2 runs: 2 COMPLETED" in inside("runs", "--status", "completed").err


def test_runs_are_shown_and_compared(filled, golden, fails, inside):
    """Output of `runs`, `show`, `tail`, `diff` and `resume --dry-run` is the same on every store."""
    golden("runs", "runs", "runs --limit 2", "runs --failed --json")
    golden(
        "show",
        "show b",
        "show a --timing",
        "show b --json --attempt 1 --input --output",
        "show a --node second --input",
        "show a --input --output",
        "show b --node second --attempt 2 --output",
        "show a --node first --rejected",
    )
    golden("tail", "tail b", "tail b --lines 1", "tail", "tail b --json")
    golden("diff", "diff a b", "diff a b --only-changed", "diff a c --json --only-changed", "diff a a")
    plans = ("resume b sums.py:pipeline --dry-run", "resume a sums.py:pipeline --dry-run")
    golden("plan", *plans, "resume a sums.py:pipeline --from third --dry-run --json")
    assert inside("diff", "a", "b", "--node", "first").code == 0
    fails(inside("diff", "a", "b", "--node", "nope"), 4, "neither run has a node 'nope'")
    fails(inside("diff", "a", "nope"), 4, "no run whose id begins with 'nope'")
    fails(inside("show", "a", "--node", "nope"), 4, "has no attempt of node 'nope'", "first, second, third")
    fails(inside("show", "a", "--attempt", "7"), 4, "has no attempt 7")
    fails(inside("tail", "nope"), 4, "no run whose id begins with 'nope'")


SUM = "class Sum(BaseModel):\n    n: int"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (SUM, f"{SUM}\n    m: int = 0", "it lacks 'm', which is new"),
        (SUM, SUM.replace("int", "float"), "the types, constraints or defaults of its fields have changed"),
        ('node("first", add_one, Count)', 'node("begin", add_one, Count)', "the pipeline has 'begin' there"),
        (
            "n: int = Field(alias=",
            "n: str = Field(alias=",
            "the input of run 'r1' is not a Count: n (string_type); restore its schema",
        ),
        ('Field(alias="start")', "Field(gt=0, alias='begin')", ""),  # It changes no run.
    ],
)
def test_a_dry_run_names_the_changes_that_prevent_a_resume(stroma, ran, inside, old, new, words):
    """--dry-run names what changed for each output, as a resume would refuse it, and calls nothing."""
    ran("r1", code=1, SECOND="raise ValueError")
    before, calls = {path: path.read_bytes() for path in stroma.home.rglob("*.db*")}, stroma.calls()
    text = (stroma.home / "sums.py").read_text()
    assert old in text
    # Longer in any case: Python takes a file of the same second and size for the one that it has compiled.
    (stroma.home / "sums.py").write_text(text.replace(old, new) + "\n# changed\n")
    planned = inside("resume", "r1", "sums.py:pipeline", "--dry-run")
    assert (planned.code, stroma.calls()) == (2 if words else 0, calls)
    assert {path: path.read_bytes() for path in before} == before
    assert ("the run cannot be resumed; restore" in planned.err) == bool(words)
    resumed = inside("resume", "r1", "sums.py:pipeline", "-q")
    assert resumed.code == planned.code
    assert words in planned.out
    assert words in resumed.err


def test_show_has_rejected_outputs(inside, shows):
    """show has the values that broke a contract beside the complaints; export has them, redact hides them."""
    shows(
        "rejected",
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
        "show x",
        "show x --node total --attempt 2 --rejected --json",
        code=1,
    )
    data = json.loads(inside("export", "x").out)["attempts"]
    alone = json.loads(inside("show", "x", "--node", "total", "--attempt", "2", "--rejected").out)
    assert [one.get("rejected") for one in data] == [None, *[alone] * 5]
    assert "rejected" not in inside("export", "x", "--no-states").out
    page = inside("export", "x", "--format", "html").out
    assert "<td><code>&quot;many &lt;b&gt;&quot;</code></td>" in page
    for line in ("show x", "show x --rejected", "export x", "export x --format html"):
        done = inside(*line.split(), "--redact", "case.py:private")
        assert (done.code, "many" in done.out) == (0, False), line


def test_groups_and_retries_as_a_tree(shows):
    """--tree draws groups and their children; --timing has their starts and the waits before retries."""
    shows(
        "tree",
        """
        from sums import *
        async def flaky(state):
            if current_node().attempt == 1:
                raise TimeoutError("again")
            return {"n": 2}
        inner = parallel(node("x", last), node("y", last))
        pipeline = Pipeline("tree", [node("begin", add_one, Count), parallel(inner, node("z", last)),
                                     node("flaky", flaky), parallel(node("again", flaky), node("w", last))],
                            config=RunConfig(policy_map=quick))
        """,
        "show x --tree",
        "show x --tree --timing",
    )


def test_nodes_of_each_item_are_below_it(shows, inside):
    """`show` lists the nodes of a map with several below their item, and has the input of each of them."""
    shows(
        "items",
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
        "show x --tree --unfold",
        "show x --node twice --input --unfold",
        given='{"counts": [{"n": 1}, {"n": 2}]}',
    )
    graph = json.loads(inside("graph", "case.py:pipeline", "--format", "json").out)
    assert [(one["node_id"], one["kind"]) for one in graph["nodes"]][1:] == [
        ("map_over(counts, [more, twice]) into done", "map_over"),
        ("[more, twice]", "sequence"),
        ("more", "node"),
        ("twice", "node"),
    ]
    planned = inside("resume", "x", "case.py:pipeline", "--dry-run")
    assert planned.code == 0, planned.out


def test_a_map_is_one_line(shows, inside, monkeypatch):
    """The line of a map counts its items; an item was retried if a node in it was."""
    shows(
        "map",
        """
        from sums import *
        class Nums(BaseModel):
            nums: list[int]
        tries = {}
        async def shaky(state):
            tries[state.n] = tries.get(state.n, 0) + 1
            if state.n < 3 and tries[state.n] == 1:
                raise ConnectionError("lost " * 40)
            if state.n == 4:
                raise ContractViolation("shaky", "output", {}, ["never"])
            return {"n": state.n}, 10, 5, "gpt-4o-mini"
        async def final(state):
            return {"n": state.n}, 100, 0, "gpt-4o-mini"
        turns = [node("shaky", shaky), node("final", final)]
        items = map_over("nums", turns, into="sums", on_item_failure="collect")
        pipeline = Pipeline("turns", [items], config=RunConfig(policy_map=quick))
        """,
        "show x",
        "show x --tree",
        given=json.dumps({"nums": list(range(6))}),
    )
    for columns in (40, 60):
        for command in (("show", "x"), ("show", "x", "--unfold"), ("runs",), ("diff", "x", "x")):
            with monkeypatch.context() as patch:
                patch.setattr("stroma.cli.output.Stream.is_terminal", True)
                text = inside(*command, env={"COLUMNS": str(columns), "NO_COLOR": "1"}).out
            assert max(map(len, text.splitlines())) <= columns, text


def test_loops_of_a_flow_are_folded(shows):
    """Repeated calls of a node in a flow are one line; with --unfold or --node each has its own."""
    shows(
        "loop",
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
        "show x --tree",
        "show x",
        "show x --tree --unfold",
        "show x --tree --node again",
        given='{"n": 1}',
    )


def test_a_cost_without_tokens(shows, ran, golden):
    """An attempt that is priced per call has its cost in its line, in that of its fold, and in tail."""
    shows(
        "images",
        """
        from pydantic import BaseModel
        from stroma import Flow, NodeContract, Pipeline, Usage, stroma_flow, stroma_node

        class Prompt(BaseModel):
            text: str

        @stroma_node("draw", NodeContract(node_id="draw", input_schema=Prompt, output_schema=Prompt))
        async def draw(prompt):
            return prompt, Usage(model="dall-e-3", cost_usd=0.04)

        @stroma_flow("draws", input=Prompt, output=Prompt)
        async def draws(flow: Flow, prompt: Prompt) -> Prompt:
            for _ in range(20):
                await flow.step(draw, prompt)
            return await flow.step(draw, prompt)

        pipeline = Pipeline("many", [draws])
        """,
        "show x",
        "tail x --lines 1",
        given='{"text": "a cat"}',
    )


def test_graph_of_recorded_runs(stroma, ran, inside, fails, golden):
    """`stroma graph --from-runs` draws the steps of all runs of a flow, and says if there are none."""
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
    ran("s")
    fails(inside("graph", "loop.py:loop", "--from-runs"), 4, "no runs of 'loop'")
    for n in (2, 3):
        ran(f"l{n}", target="loop.py:loop", given=f'{{"n": {n}}}')
    drawn = "graph loop.py:loop --from-runs --format"
    golden("graph-of-runs", f"{drawn} mermaid", f"{drawn} json", columns=(None,))
    assert inside(*drawn.split(), "svg").out.startswith("<svg")
    assert "again" not in inside("graph", "loop.py:loop", "--format", "mermaid").out


@pytest.mark.core
def test_what_a_terminal_would_obey(stroma, ran, inside):
    """Control characters and lone surrogates in ids, messages, models and states are shown escaped."""
    stroma.file(
        "evil.py",
        f"""
        from sums import *
        EVIL = {EVIL!r}
        class Text(BaseModel):
            text: str = EVIL
            more: dict[str, str] = {{}}
        HALF = EVIL + "\\ud83d"
        async def talks(state):
            return {{"text": HALF, "more": {{HALF: HALF}}}}, 3, EVIL
        async def fails(state):
            raise ValueError(HALF)
        pipeline = Pipeline(EVIL + "p", [node(EVIL + "talks", talks, Text, Text),
                                        node("fails", fails, Text, Text)],
                            config=RunConfig(policy_map=quick, tags=(EVIL,)))
        """,
    )
    for run_id, given in (("r" + EVIL, "{}"), ("other", '{"text": "x"}')):
        ran(run_id, target="evil.py:pipeline", given=given, code=1)
    lines = """
        runs|runs --json|show r|show r --tree --timing|show r --json|show r --input --output|show r --rejected
        show r --rejected --json|diff r other|diff r other --json|tail r|tail|tail r --json
        resume r evil.py:pipeline --dry-run|export r|export r --format html
        runs --search EVIL|runs --tag EVIL|show EVIL|run evil.py:pipeline --run-id thirdEVIL
        resume r evil.py:pipeline|cancel other|runs --tag EVILnone|diff r other --node EVIL|show r --node EVIL
        show noEVIL|run noEVIL.py:pipeline|run evil.py:pipeline --input noEVIL.json|noEVIL|diff \u202eevil r
        replay r evil.py:pipeline
    """
    for line in re.split(r"\||\n", lines.strip()):
        done = inside(*(word.replace("EVIL", EVIL) for word in line.split()))
        assert done.code in (0, 1, 2, 4, 6), (line, done)
        for text in (done.out, done.err):
            assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text), (line, text)
            text.encode()  # A lone surrogate is escaped too.
        if done.code in (0, 6) and ("--json" in line or line == "export r"):
            [json.loads(part) for part in (done.out.splitlines() if "tail" in line else [done.out])]


LETTERS = """
    from sums import *
    from stroma import Flow, stroma_flow

    @stroma_flow("letters", input=Count, output=Sum)
    async def letters(flow: Flow, state):
        for n in range(3):
            out = await flow.step(second, Sum(n=n))
        return out
"""


def test_a_fork_at_a_call_of_a_flow(stroma, inside, fails, ran):
    """--fork --from takes a call of a flow, by its node or its place, as runner.fork(at=) does."""
    stroma.file("letters.py", LETTERS)
    ran("x", target="letters.py:letters")
    assert len(stroma.calls()) == 3
    words = ("resume", "x", "letters.py:letters", "-q", "--from")
    assert inside(*words, "second#2", "--fork").code == 0
    assert len(stroma.calls()) == 4
    assert inside(*words, "second", "--fork").code == 0
    assert len(stroma.calls()) == 7
    fails(inside(*words, "second"), 2, "is not a node of letters.py:letters", "add --fork")
    fails(inside(*words, "nope", "--fork"), 4, "has no end of a call 'nope'")
    no = inside(*words, "second", "--fork", "--state", '{"n": 1}')
    fails(no, 2, "'second' is a call of a flow", "to give the output of that call, pass --output")
    ran("y", target="letters.py:letters", code=1, SECOND="raise TimeoutError")
    calls, words = stroma.calls(), ("resume", "y", *words[2:])
    for place in ("second", "0.second#0"):
        done = inside(*words, place, "--fork", "--output", '{"n": 7}')
        assert (done.code, stroma.calls()) == (0, [*calls, "second", "second"]), done
        calls = stroma.calls()
    fails(inside(*words, "second", "--fork", "--output", "{}"), 2, "does not fit the output of node 'second'")
    fails(inside(*words, "nope", "--fork", "--output", "{}"), 2, "names no node 'nope'")


MASKED = """
    from sums import *

    async def breaks(state):
        return {"n": "x"}, 100, 20, "gpt-4o-mini"

    config = RunConfig(budget=ExecutionBudget(max_tokens_total=150), contract_retries={"breaks": 5})
    pipeline = Pipeline("masked", [node("breaks", breaks, Count)], config=config)
"""


def test_a_budget_crossed_by_a_broken_contract(stroma, inside, ran):
    """show and runs name the budget that stopped a run whose last output broke its contract."""
    stroma.file("masked.py", MASKED)
    ran("x", target="masked.py:pipeline", code=5)
    for words in (("show", "x"), ("runs",)):
        assert "BudgetExceeded: budget exceeded: max_tokens_total limit 150" in inside(*words).out
    assert "; the last failure: ContractViolation: " in inside("show", "x").out


def test_items_of_a_map_that_changed_alike_are_one_line():
    """A run with a map of a thousand items has a line for each node, and not for each item."""
    items = [Incompatibility(f"1.{n}", "shout", "its output has changed") for n in range(1000)]
    assert _change_lines([Incompatibility("0", "split", "it is gone"), *items]) == [
        "0  split: it is gone",
        "1.0  shout: its output has changed (and 999 other outputs of this node)",
    ]


def test_timing_has_the_time_of_functions_where_a_group_also_waited(stroma, ran, inside):
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
    ran("w", target="waits.py:pipeline")
    lines = inside("show", "w", "--tree", "--timing").out.splitlines()
    table = lines[lines.index("") + 1 :]
    assert re.search(r"BEGAN +WAITED +TIME +FUNCTIONS", table[0])
    assert re.search(r"parallel\(flaky, y\) .* \d\.\d\d s +\d\.\d\d s", table[2])


LONG = """
    from sums import *

    async def fails(state):
        if current_node().attempt == 1:
            raise ValueError("long " * 60 + "end")
        return {"n": 1}

    pipeline = Pipeline("long", [first, node("fails", fails)], config=RunConfig(policy_map=quick))
"""


def test_a_pipe_gets_the_whole_message(stroma, inside, ran):
    """A pipe gets whole messages; --timing counts from the start; --output skips attempts without one."""
    stroma.file("long.py", LONG)
    ran("x", target="long.py:pipeline")
    shown = inside("show", "x", "--timing").out
    assert "long end" in shown
    began = [float(one) for one in re.findall(r"\+([\d.]+) s", shown)]
    assert began[0] > 0
    done = inside("show", "x", "--output")
    assert (done.code, done.err, done.out.count("# ")) == (0, "", 2)
    failed = inside("show", "x", "--output", "--node", "fails", "--attempt", "1")
    assert (failed.code, "it committed nothing" in failed.err) == (4, True)


def test_a_narrow_terminal_keeps_the_times(shows):
    """At 80 columns `show --timing` has the times, and the command to resume is broken before its options."""
    long = "stop_after_the_first_page_was_read_and_nothing_else"
    shows(
        "narrow",
        f"""
        from sums import *
        pipeline = Pipeline("{long}", [node("first", add_one, Count),
                                       parallel(node("classify", double), node("risk", last))],
                            config=RunConfig(policy_map=quick))
        """,
        "show x --timing",
        code=1,
        SECOND="raise TimeoutError('the provider did not answer within 30 s')",
    )
