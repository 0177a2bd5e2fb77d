"""`stroma run` and `stroma resume`: what they print, log, keep and return."""

import asyncio
import json
import logging
import os
import re
import shlex
import signal
import stat
import time
from collections.abc import Iterator

import pytest
from tests.cli.test_signals import wait_for

from stroma import StromaRunner
from stroma.cli.progress import show_warnings

GOOD = '{"start": 1}'


@pytest.mark.slow
def test_run_prints_the_final_state(stroma):
    """stdout has the final state and nothing else, though nodes print; progress goes to stderr, plain."""
    done = stroma("run", "sums.py:pipeline", GOOD)
    assert (done.code, json.loads(done.out)) == (0, {"n": 4})
    assert "printed by a node" in done.err
    assert "\x1b" not in done.err
    lines = [re.split(r"  +", line[14:]) for line in done.err.splitlines() if re.match(r"\d\d:\d\d:", line)]
    assert [line[:2] for line in lines if len(line) > 1] == [
        ["first", "start"],
        ["first", "ok"],
        ["second", "start"],
        ["second", "ok"],
        ["third", "start"],
        ["third", "ok"],
    ]
    assert re.search(
        r"second +ok +\d\.\d\d s, 15 tok, \$0\.00000\d, gpt-4o-mini  \| run: 135 tok, \$0\.0000\d\d\n",
        done.err,
    )
    assert re.search(
        r"done: COMPLETED in .*; 135 tok, \$0\.0000\d\d\ndetails: .* show [0-9a-f]{12}\n$", done.err
    )


TOOL = """
import os, subprocess, sys
from pydantic import BaseModel
from stroma import Pipeline, StromaRunner

class State(BaseModel):
    n: int

runner = StromaRunner.quick()

@runner.node
def tool(state: State) -> State:
    os.write(1, b"written by a node\\n")
    subprocess.run([sys.executable, "-c", "print('printed by a tool')"], check=True)
    return state

pipeline = Pipeline("tools", [tool])
"""


@pytest.mark.slow
def test_what_subprocesses_of_nodes_print_is_not_data(stroma):
    """stdout is one JSON object with --json, though nodes start programs that print."""
    stroma.file("tool.py", TOOL)
    done = stroma("run", "tool.py:pipeline", '{"n": 4}', "--json")
    assert (done.code, json.loads(done.out)["final_state"]) == (0, {"n": 4})
    assert "written by a node\n" in done.err
    assert "printed by a tool\n" in done.err


def test_the_default_store_is_private(stroma, inside):
    """Without --db the store is in the user's data directory: the file 0600, its directories 0700."""
    assert inside("run", "sums.py:pipeline", GOOD, "-q").code == 0
    path = stroma.home / ".local"
    for part in ("share", "stroma", "runs.db"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        path /= part
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_stores_can_be_chosen(stroma, inside):
    """--db wins over STROMA_DB, and that over XDG_DATA_HOME; a store in memory leaves no file."""
    data = {"XDG_DATA_HOME": str(stroma.home / "xdg")}
    inside("run", "sums.py:pipeline", GOOD, env=data)
    env = data | {"STROMA_DB": "b.db"}
    named = inside("run", "sums.py:pipeline", GOOD, "--db", "sqlite:///a.db", env=env)
    assert "--db sqlite:///a.db" in named.err
    from_env = inside("run", "sums.py:pipeline", GOOD, env=data | {"STROMA_DB": "b.db"})
    assert "--db" not in from_env.err
    databases = sorted(p.relative_to(stroma.home).as_posix() for p in stroma.home.rglob("*.db"))
    assert databases == ["a.db", "b.db", "xdg/stroma/runs.db"]
    passing = inside("run", "sums.py:pipeline", GOOD, "--db", "memory://")
    assert passing.code == 0
    assert "show" not in passing.err


RUN = f"run sums.py:pipeline '{GOOD}' -q --run-id"


def test_what_is_printed_at_the_end(golden, monkeypatch):
    """stdout has the final state, or one JSON object; stderr the reason of another end, and a command."""
    golden("run", f"{RUN} a", f"{RUN} b --json")
    monkeypatch.setenv("SECOND", "state = 1; raise ContractViolation('x', 'output', {}, [])")
    golden("run-failed", f"{RUN} a", f"{RUN} b --json")
    monkeypatch.setenv("SECOND", "current_node().report_usage(input_tokens=50); raise TimeoutError('slow')")
    # A failure that is not retried because the budget is spent is the budget's.
    golden(
        "run-over-budget",
        *(f"{RUN} {name} --budget-tokens 150" for name in ("c", "d --json")),
        columns=(120,),
    )


def test_failure_then_resume(stroma, inside):
    """A failed run says what failed, why, and the next command, which calls only what is missing."""
    breaks = {"SECOND": "raise RuntimeError('no luck\\x1b[2J')"}
    done = inside("run", "sums.py:pipeline", GOOD, "--db", "my runs.db", env=breaks)
    assert (done.code, done.out) == (1, "")
    assert re.search(r"second +FAILED +AMBIGUOUS, .*  \| RuntimeError: no luck\\x1b\[2J\n", done.err)
    assert (
        "is PARTIAL: node 'second' (at 1, attempt 2): AMBIGUOUS\n  why: RuntimeError: no luck\\x1b[2J\n"
        in done.err
    )
    assert re.search(r'  File "<break>", line 1, in <module>\n', done.err)
    mend = re.search(r"resume with: stroma (resume .*)\n", done.err)
    resumed = inside(*shlex.split(mend[1]))
    assert (resumed.code, json.loads(resumed.out)) == (0, {"n": 4})
    assert re.search(r"first +restored +finished earlier", resumed.err)
    assert "before that 120 tok" in resumed.err
    assert stroma.calls() == ["first", "second", "second", "second", "third"]


def test_budget(stroma, inside):
    """A run that its budget stops ends with 5, and the command that it names goes on under a larger one."""
    done = inside("run", "sums.py:pipeline", GOOD, "--budget-tokens", "100")
    assert (done.code, done.out) == (5, "")
    assert re.search(r"first +BUDGET ", done.err)
    mend = re.search(r"resume with more: stroma (resume .* --budget-tokens 200)\n", done.err)
    assert re.search(r"resume with more: stroma resume .* --budget-tokens N\n", inside("show", "last").err)
    plan = inside("resume", "last", "sums.py:pipeline", "--dry-run").err
    assert re.search(r"resume with: stroma resume .* --budget-tokens N\n", plan)
    resumed = inside(*mend[1].split())
    assert (resumed.code, json.loads(resumed.out)) == (0, {"n": 4})
    assert stroma.calls() == ["first", "second", "third"]
    dollars = inside("run", "sums.py:pipeline", GOOD, "--budget-usd", "0.00000001", "--json")
    assert dollars.code == 5
    assert re.search(r"--budget-usd 0\.0[\d]+$", json.loads(dollars.out)["resume"])


SETTINGS = """
    from sums import *

    never = {"RECOVERABLE": FailurePolicy(max_retries=0)}
    runner = StromaRunner.quick(budget=ExecutionBudget(max_tokens_total=100), policy_map=never)
    plain = StromaRunner.quick()
    pipeline = Pipeline("sums", [first, second, third])
    generous = Pipeline("sums", [first, second, third], config=RunConfig(tags=("generous",)))

    @runner.flow("sum", input=Count, output=Sum)
    async def flow(flow, count):
        return await flow.step(second, await flow.step(first, count))
"""


@pytest.mark.parametrize("name", ["pipeline", "flow"])
def test_settings_of_the_runner_beside_a_pipeline(stroma, inside, name):
    """A pipeline or flow without a config runs, and is resumed, under the settings of its file's runner."""
    stroma.file("settings.py", SETTINGS)
    assert inside("run", f"settings.py:{name}", GOOD, "--run-id", "x").code == 5
    assert inside("resume", "x", f"settings.py:{name}").code == 5
    assert stroma.calls() == ["first"]
    slow = {"SECOND": "raise TimeoutError('slow')"}
    assert inside("resume", "x", f"settings.py:{name}", "--budget-tokens", "1000", env=slow).code == 1
    assert stroma.calls() == ["first", "second"]


def test_a_pipeline_with_its_own_config_has_the_settings_of_the_runner_too(stroma, inside, fails):
    """The settings of the runner beside it win. Several runners need a config."""
    stroma.file("settings.py", SETTINGS)
    assert inside("run", "settings.py:generous", GOOD).code == 5
    assert json.loads(inside("runs", "--json").out)["runs"][0]["tags"] == ["generous"]
    stroma.file("several.py", SETTINGS + '    second_runner = StromaRunner.quick(tags=("x",))\n')
    assert inside("run", "several.py:generous", GOOD).code == 0
    fails(
        inside("run", "several.py:pipeline", GOOD),
        2,
        "has no config, and 2 runners beside it have settings: runner, second_runner",
        "pass one: Pipeline('sums', nodes, config=runner.config)",
    )


def test_another_flow_does_not_continue_a_run(stroma, inside, fails):
    """A run of one flow is not resumed as another, which would make its own calls, effects too."""
    stroma.file("settings.py", SETTINGS)
    stroma.file(
        "other.py",
        """
        from settings import *

        @plain.flow("other", input=Count, output=Sum)
        async def other(flow, count):
            return await flow.step(second, await flow.step(first, count))
        """,
    )
    assert inside("run", "settings.py:flow", GOOD, "--run-id", "x").code == 5
    for options in ((), ("--dry-run",)):
        refused = inside("resume", "x", "other.py:other", *options)
        fails(
            refused, 2, "was started by the pipeline 'sum'; this one is 'other'", "pass that pipeline or flow"
        )
    assert stroma.calls() == ["first"]


def test_run_id_again(stroma, inside, ran):
    """A run id again is a new execution; with --resume it goes on, and an unknown one begins."""
    for execution in (1, 2):
        assert inside("run", "sums.py:pipeline", GOOD, "--run-id", "x").code == 0
        assert json.loads(inside("runs", "--json").out)["runs"][0]["execution"] == execution
    again = inside("run", "sums.py:pipeline", "--run-id", "x", "--resume")
    assert (again.code, json.loads(again.out)) == (0, {"n": 4})
    assert stroma.calls() == ["first", "second", "third"] * 2
    ran("y", "--resume")
    assert stroma.calls() == ["first", "second", "third"] * 3


def test_a_run_that_has_not_ended_needs_resume_or_restart(stroma, inside, fails):
    """An interrupted run id is refused with both commands that continue; --restart calls its nodes again."""
    words = ("run", "sums.py:pipeline", GOOD, "--run-id", "x", "-q")
    assert inside(*words, env={"SECOND": "sys.exit('enough')"}).code == 1
    calls = stroma.calls()
    fails(
        inside(*words),
        2,
        "has not ended (INTERRUPTED); a new execution would discard 1 committed node",
        "resume it: stroma resume x sums.py:pipeline",
        "repeat the command with --restart",
    )
    assert stroma.calls() == calls
    assert json.loads(inside(*words, "--restart").out) == {"n": 4}
    assert stroma.calls() == [*calls, "first", "second", "third"]
    fails(inside(*words, "--restart", "--resume"), 2, "exclude each other")
    fails(inside("run", "sums.py:pipeline", GOOD, "--restart"), 2, "--restart needs --run-id")
    another = ("run", "sums.py:pipeline", '{"start": 2}', "--run-id", "x", "--resume", "-q")
    fails(inside(*another), 2, "started with another input", "--from NODE")


def test_resume_from(stroma, inside, fails):
    """--from makes a node's output, and those after it, anew; a node that is not there is a usage error."""
    inside("run", "sums.py:pipeline", GOOD, "--run-id", "x")
    done = inside("resume", "x", "sums.py:pipeline", "--from", "second")
    assert (done.code, json.loads(done.out)) == (0, {"n": 4})
    assert stroma.calls()[3:] == ["second", "third"]
    fails(inside("resume", "x", "sums.py:pipeline", "--from", "no"), 2, "its nodes are: first, second, third")


def test_resume_says_what_it_cannot(stroma, inside, fails):
    """Resuming names what is missing: the target (never imported from the store), run and pipeline."""
    inside("run", "sums.py:pipeline", GOOD, "--run-id", "x")
    fails(inside("resume", "x"), 2, "run x has ended: it is COMPLETED", "stroma show x")
    fails(inside("resume", "z", "sums.py:pipeline"), 4, "no run whose id begins with 'z'")
    stroma.file(
        "other.py",
        "from sums import *\nclass Text(BaseModel):\n    text: str\n"
        "pipeline = Pipeline('others', [node('n', last, Text)])",
    )
    fails(inside("resume", "x", "other.py:pipeline", "-q"), 2, "is not a Text: text (missing)")
    stroma.file("fewer.py", "from sums import *\npipeline = Pipeline('sums', [first, third])")
    fails(inside("resume", "x", "fewer.py:pipeline", "-q"), 2, "cannot be resumed", "--from NODE")


def test_several_runs_are_resumed(stroma, inside, ran, fails):
    """`resume` continues each run that is named or matches, lists them, and ends with the worst code."""
    breaks = {"SECOND": "raise RuntimeError('no luck')"}
    for run_id in ("a", "b", "c"):
        ran(run_id, code=1, **breaks)
    ran("done")
    done = inside("resume", "c", "a", "sums.py:pipeline", env=breaks)
    assert done.code == 1
    assert [line.split()[:3] for line in done.out.splitlines()[1:]] == [
        ["c", "sums", "PARTIAL"],
        ["a", "sums", "PARTIAL"],
    ]
    assert "2 runs: 2 PARTIAL\n  2 stopped by node 'second': AMBIGUOUS\n" in done.err
    calls = len(stroma.calls())
    done = inside("resume", "--failed", "sums.py:pipeline", "--dry-run")
    assert re.findall(r"^run .*$|^calls .*$", done.out, re.MULTILINE) == [
        line for run_id in "abc" for line in (f"run {run_id}", "calls   second, third")
    ]
    done = inside("resume", "--failed", "--since", "1h", "sums.py:pipeline", "--json")
    data = json.loads(done.out)
    assert (done.code, data["schema"], data["totals"]["statuses"]) == (0, "stroma.runs/1", {"RESUMED": 3})
    assert [one["run_id"] for one in data["runs"]] == ["a", "b", "c"]
    assert stroma.calls()[calls:] == ["second", "third"] * 3
    done = inside("resume", "--failed", "sums.py:pipeline")
    assert (done.code, done.out) == (0, "")
    assert "no run that can be resumed matches in " in done.err
    fails(inside("resume", "a", "sums.py:pipeline", "--failed"), 2, "and not both")
    fails(inside("resume"), 2, "pass RUN, or a filter such as --failed")
    fails(inside("resume", "a", "b", "sums.py:pipeline", "--from", "third", "--fork"), 2, "take one RUN")


def test_several_runs_are_handed_to_workers(stroma, inside, ran):
    """Without a pipeline, `resume` makes each run due that can be, and says why another one is not."""
    for run_id in ("a", "b"):
        ran(run_id, code=1, SECOND="raise RuntimeError('no luck')")
    ran("done")
    done = inside("resume", "a", "done", "b")
    assert done.code == 2
    assert "run done has ended: it is COMPLETED" in done.err
    assert done.err.count("is due: a worker that serves pipeline 'sums' continues it") == 2
    runs = json.loads(inside("runs", "--json").out)["runs"]
    assert [one["run_id"] for one in runs if one["due"]] == ["b", "a"]


CLIENT = """
    from sums import *

    class Client:
        loop = None
        async def ask(self):
            self.loop = self.loop or asyncio.get_running_loop()
            if self.loop is not asyncio.get_running_loop():
                raise RuntimeError("Event loop is closed")

    client = Client()

    async def ask(state):
        exec(compile(os.environ.get("SECOND", "pass"), "<break>", "exec"), globals())
        await client.ask()
        return state

    pipeline = Pipeline("asks", [node("ask", ask, Count)])
"""


def test_runs_that_are_resumed_together_share_a_loop(stroma, inside, ran):
    """A client of the pipeline's module works in all runs that one command resumes."""
    stroma.file("client.py", CLIENT)
    for run_id in ("a", "b"):
        ran(run_id, target="client.py:pipeline", code=1, SECOND="raise RuntimeError('no luck')")
    assert inside("resume", "a", "b", "client.py:pipeline").code == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, "CANCELLED"), (signal.SIGTERM, "INTERRUPTED")]
)
def test_a_signal_ends_the_resumes(stroma, ran, number, status):
    """A signal stops the run in progress, and the runs after it are not resumed."""
    for run_id in ("a", "b"):
        ran(run_id, code=1, SECOND="raise ValueError")
    os.remove(stroma.home / "calls")
    process = stroma.popen(
        "resume", "--failed", "sums.py:pipeline", "--drain", "0", env={"SECOND_AWAITS": "asyncio.sleep(60)"}
    )
    wait_for(process, "second ")
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "1 run not resumed" in err
    assert stroma.calls() == ["second"]
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [["a", "sums", status]]


@pytest.mark.slow
def test_any_run_id(stroma, inside):
    """A run id of any text is shown without its control characters, in a command that a shell takes."""
    run_id = "it's \x1b[31m a/b:*\n\u00e9 \u202e😀"
    done = inside("run", "sums.py:pipeline", GOOD, "--run-id", run_id)
    assert done.code == 0
    assert not set(done.err) & {"\x1b", "\u202e"}
    shown = stroma.line(done.err.split("details: ")[1])
    assert (shown.code, shown.err) == (0, "")
    assert not set(shown.out) & {"\x1b", "\u202e"}
    assert json.loads(inside("show", run_id, "--json").out)["run"]["run_id"] == run_id
    assert "show -- -x" in inside("run", "sums.py:pipeline", GOOD, "--run-id", "-x").err
    assert inside("show", "--", "-x").code == 0


def test_groups_and_items(stroma, inside):
    """Children of groups are indented, items of a map carry their index, and kept ones differ on resume."""
    stroma.file(
        "fan.py",
        """
        from sums import *
        class Nums(BaseModel):
            nums: list[int]
        class Total(BaseModel):
            total: int
        async def count(state):
            return {"nums": list(range(state.n))}
        async def add(state):
            exec(os.environ.get("ADD", "pass"), globals())
            return {"total": sum(item.n for item in state.sums)}
        class Sums(BaseModel):
            sums: list[Sum]
        pipeline = Pipeline("fan", [
            node("count", count, Count, Nums), map_over("nums", second, into="sums"),
            parallel(node("add", add, Sums, Total), node("also", add, Sums, Total)),
        ])
        """,
    )
    env = {"ADD": "raise ContractViolation('x', 'output', {}, [])"}
    done = inside("run", "fan.py:pipeline", '{"start": 11}', env=env)
    assert done.code == 1
    assert re.search(r"  map_over\(nums, second\) +start\n", done.err)
    assert not re.search(r"second\[\d+\] +start", done.err)
    assert re.search(r"    second\[10\] +ok ", done.err)
    assert "node 'add' (at 2.0) in parallel(add, also): TERMINAL (contract)" in " ".join(done.err.split())
    shown = inside("show", "last", "--unfold")
    places = [line.split()[0] for line in shown.out.partition("AT ")[2].splitlines()[1:]]
    assert places == ["0", "1", *(f"1.{i}" for i in range(11)), "2", "2.0", "2.1"]
    assert re.search(r"\n1\.10 +  second +1 +success", shown.out)
    resumed = inside("resume", "last", "fan.py:pipeline")
    assert (resumed.code, json.loads(resumed.out)) == (0, {"total": 110})
    assert "restored" in resumed.err


def test_unknown_price_and_raising_hook_are_noted(stroma, inside):
    """What did not stop a run but should be known is said at its end."""
    stroma.file(
        "odd.py",
        """
        from sums import *
        async def own(state):
            return {"n": 1}, 5, "no-such-model-anywhere"
        async def broken(*args):
            raise KeyError("of the hook")
        pipeline = Pipeline("odd", [node("own", own, Count)],
                            config=RunConfig(hooks=NodeHooks(on_node_start=broken)))
        """,
    )
    done = inside("run", "odd.py:pipeline", GOOD)
    assert (done.code, json.loads(done.out)) == (0, {"n": 1})
    assert "note: no price for no-such-model-anywhere" in done.err
    assert "note: 1 hook call raised" in done.err
    assert "of the hook" in done.err
    assert "Traceback" not in done.err


def test_what_breaks_off_a_run(stroma, inside, fails):
    """A hook that is not async, and a node that ends the process, end in one message with the user's line."""
    stroma.file(
        "bad.py",
        """
        from sums import *
        pipeline = Pipeline("bad", [first],
                            config=RunConfig(hooks=NodeHooks(on_node_start=lambda *args: None)))
        """,
    )
    fails(inside("run", "bad.py:pipeline", GOOD, "-q"), 1, "a hook of the pipeline's config", "not async")
    done = inside("run", "sums.py:pipeline", GOOD, "-q", env={"SECOND": "sys.exit('enough')"})
    done.err = done.err.replace("printed by a node\n", "")
    fails(done, 1, "ended the process: SystemExit: enough", "sums.py", "resume with: stroma resume ")
    assert json.loads(inside("runs", "--json").out)["runs"][0]["status"] == "INTERRUPTED"


@pytest.mark.parametrize(
    ("no_color", "term", "coloured"),
    [("", "xterm-256color", True), ("1", "xterm-256color", False), ("", "dumb", False)],
)
def test_colours_only_on_a_terminal(inside, monkeypatch, no_color, term, coloured):
    """A terminal gets colours, unless it is dumb or NO_COLOR is set."""
    monkeypatch.setattr("stroma.cli.output.Stream.is_terminal", True)
    done = inside("run", "sums.py:pipeline", GOOD, env={"NO_COLOR": no_color, "TERM": term})
    assert done.code == 0
    assert ("\x1b[1m" in done.out + done.err) is coloured


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        ("TypeError('not code')", "see why it failed, fix what is wrong, then resume with: stroma resume x "),
        ("TimeoutError()", "it may work later; resume with: stroma resume x "),
        ("NotImplementedError()", "a retry will not help: fix the cause, then resume with: stroma resume x "),
        (
            "__import__('stroma').BudgetExceeded('latency', 1, 2, 'second')",
            "raise max_latency_ms in the pipeline's budget, or with `stroma budget`; then resume with: "
            "stroma resume x ",
        ),
    ],
)
def test_the_hint_after_a_failure_fits_its_class(ran, inside, error, hint):
    """Only a RECOVERABLE failure is said to go away by itself; an AMBIGUOUS one may be a mistake. `show`
    gives the same advice.
    """
    code = 5 if "BudgetExceeded" in error else 1
    assert hint in ran("x", code=code, SECOND=f"raise {error}").err
    assert hint in inside("show", "x").err


def test_the_time_of_a_run_has_no_flush(inside, monkeypatch):
    """The duration that `stroma run` prints is that of the run, without the flush of exporters."""

    async def flush(*_, **__):
        await asyncio.sleep(1.5)

    monkeypatch.setattr(StromaRunner, "aclose", flush)
    began = time.monotonic()
    done = inside("run", "sums.py:pipeline", GOOD)
    assert time.monotonic() - began >= 1.5
    assert float(re.search(r"done: COMPLETED in (\S+) s", done.err)[1]) < 1


logger = logging.getLogger("stroma")


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restore the handlers of the logger."""
    before = logger.handlers[:]
    yield
    logger.handlers[:] = before


@pytest.mark.parametrize("debug", ["0", "1"])
def test_an_exception_without_text_is_logged_by_its_type(
    debug: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """G8: printing a record raises nothing, whatever the exception of a hook does when it is shown."""
    monkeypatch.setenv("STROMA_DEBUG", debug)
    show_warnings(quiet=False)
    try:
        raise Unprintable
    except Unprintable:
        logger.exception("hook on_run_end raised")
    assert "hook on_run_end raised: Unprintable" in capsys.readouterr().err
