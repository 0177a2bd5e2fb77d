"""Whatever is wrong with what the command is given ends in one message, with the right exit code."""

import json
import resource
import sqlite3
import sys

import pytest
from tests.cli.terminal import run_on_terminal

from stroma import SQLiteStore
from stroma.cli import stores

GOOD = '{"start": 1}'

#: Files to load from: name, text.
FILES = {
    "broken.py": "import sums\n\ndef helper():\n    return undefined_name\n\nhelper()\n",
    "syntax.py": "x = (1,\ny = 2\n",
    "needs.py": "import surely_not_installed\n",
    "leaves.py": "import sys\nsys.exit('usage: leaves')\n",
    "notanode.py": "from stroma import Pipeline\nasync def f(state): ...\npipeline = Pipeline('p', [f])\n",
    "many.py": """
        from sums import *
        nodes = [first, second]
        runner = StromaRunner.quick()
        class holder:
            inner = pipeline
    """,
    "open.py": """
        from sums import *
        @stroma_node("bare", None)
        async def bare(state): return {"saw": state.model_dump()}
        bare_first = Pipeline("bare", [bare])
        class Left(BaseModel):
            left: str
        class Right(BaseModel):
            right: int
        async def echo(state): return {"n": 1}
        both = Pipeline("both", [parallel(node("l", echo, Left), node("r", echo, Right))])
        mapped = Pipeline("mapped", [map_over("items", second, into="sums")])
        same = Pipeline("same", [parallel(node("a", echo, Count), node("b", echo, Count))])
        empty = Pipeline("empty", [])
    """,
    "starts.py": """
        from sums import *
        from stroma import RunExists

        raise RunExists("run 'x' has not ended")  # What runner.run(...) at the top level raises here.
    """,
    "text.txt": "not Python",
    "my-pipe.py": "from sums import pipeline\n",
    "json.py": "from sums import pipeline\n",
    "package/__init__.py": "",
    "package/flows.py": "from sums import pipeline\n",
    "input.json": '\ufeff{"start": 5}',
    "bad.json": '{\n  "start": 1\n  "x": 2\n}\n',
}


@pytest.fixture
def files(stroma):
    for name, text in FILES.items():
        stroma.file(name, text)
    return stroma


@pytest.mark.parametrize(
    ("target", "code", "words"),
    [
        ("nofile.py:pipeline", 4, ["no file nofile.py", "check the path"]),
        ("no/where.py:pipeline", 4, ["no file no/where.py", "check the path"]),
        ("no.such.module:pipeline", 4, ["no module 'no.such.module'"]),
        ("no-such-module:pipeline", 4, ["no file or module 'no-such-module'"]),
        ("package:pipeline", 2, ["package is a directory"]),
        ("text.txt:pipeline", 2, ["is not a Python file"]),
        ("sums.py:nope", 4, ["no 'nope' in sums.py", "it has sums.py:pipeline"]),
        ("many.py:nope", 4, ["it has many.py:pipeline"]),
        ("sums.py", 2, ["'sums.py' names no pipeline", "sums.py:pipeline"]),
        ("sums.py:", 2, ["names no pipeline"]),
        (":pipeline", 2, ["names no file or module"]),
        ("sums.py:a b", 2, ["not a Python name"]),
        ("sums.py:first", 2, ["is not a pipeline: it is of type function", "it has sums.py:pipeline"]),
        ("many.py:nodes", 2, ["is not a pipeline: it is of type list", "it has many.py:pipeline"]),
        ("many.py:runner", 2, ["not a pipeline: it is of type StromaRunner"]),
        ("broken.py:pipeline", 2, ["NameError", 'broken.py", line 4, in helper', "return undefined_name"]),
        ("syntax.py:pipeline", 2, ["SyntaxError", 'syntax.py", line 1']),
        ("needs.py:pipeline", 3, ["needs a module that is not installed", "'surely_not_installed'"]),
        ("leaves.py:pipeline", 2, ["ended the process", "__main__"]),
        ("starts.py:pipeline", 2, ["RunExists: run 'x' has not ended", "if __name__ == '__main__':"]),
        ("notanode.py:pipeline", 2, ["is not a stroma node; decorate it", 'notanode.py", line 3']),
    ],
)
def test_targets(files, inside, fails, target, code, words):
    """A target that cannot be loaded says why, and what to do."""
    fails(inside("run", target, GOOD), code, *words)


@pytest.mark.parametrize(
    "target", ["many.py:holder.inner", "my-pipe.py:pipeline", "json.py:pipeline", "package.flows:pipeline"]
)
def test_targets_that_load(files, inside, target):
    """A nested name, a file with any name and a module inside a package all load."""
    done = inside("run", target, GOOD, "-q")
    assert (done.code, done.out and json.loads(done.out)) == (0, {"n": 4}), done


def test_debug_shows_the_traceback(files, inside):
    """With STROMA_DEBUG=1 the whole traceback is shown before the message."""
    done = inside("run", "broken.py:pipeline", GOOD, env={"STROMA_DEBUG": "1"})
    assert done.code == 2
    assert done.err.startswith("Traceback")
    assert "stroma: " in done.err


@pytest.mark.parametrize(
    ("value", "code", "words"),
    [
        ('{"start": ', 2, ["INPUT is not JSON: Expecting value: line 1 column 11"]),
        ("input.json", 2, ["put an @ before it: @input.json"]),
        ("@bad.json", 2, ["bad.json is not JSON", "line 3 column 3"]),
        ("@none.json", 4, ["input file none.json"]),
        ("@.", 2, ["cannot be read: Is a directory"]),
        ("-", 2, ["stdin is not JSON"]),
        (None, 2, ["an empty input", "start: Field required", """'{"start": 0}'"""]),
        (
            '{"start": "x"}',
            2,
            [
                "INPUT does not fit the contract of the first node, 'first'",
                "start: Input should be a valid integer",
                '{"start": 0}',
            ],
        ),
        ("[1]", 2, ["Input should be an object"]),
        ("[" * 100_000, 2, ["INPUT is not JSON"]),
        ("9" * 5000, 2, ["INPUT is not JSON"]),
        ('{"text": ' + "x" * 5000, 2, ["INPUT is not JSON"]),
    ],
)
def test_inputs(files, inside, fails, value, code, words):
    """Input that is no JSON says where, input that fails the first contract says so field by field."""
    done = inside("run", "sums.py:pipeline", *([] if value is None else [value]))
    fails(done, code, *words)
    assert files.calls() == []
    assert not list(files.home.rglob("*.db"))


def test_inputs_that_fit(files, inside, fails):
    """A file with a byte order mark, stdin, a field's name in place of its alias: each is read."""
    assert json.loads(inside("run", "sums.py:pipeline", "@input.json", "-q").out) == {"n": 12}
    assert json.loads(inside("run", "sums.py:pipeline", "-", "-q", stdin=b'{"n": 2}').out) == {"n": 6}
    done = inside("run", "sums.py:pipeline", "-", stdin=b'{"start": "\xe9"}')
    fails(done, 2, "stdin is not JSON: 'utf-8' codec can't decode byte 0xe9 in position 11")


def test_first_nodes_without_one_contract(files, inside, fails):
    """Nodes side by side each find their fields; their contracts are checked before anything runs."""
    seen = json.loads(inside("run", "open.py:bare_first", '{"a": [1, null]}', "-q").out)
    assert seen == {"saw": {"a": [1, None]}}
    assert json.loads(inside("run", "open.py:both", '{"left": "x", "right": 2}', "-q").out) == {"n": 1}
    fails(inside("run", "open.py:both", '{"left": "x"}'), 2, "'r'", "right: Field required")
    done = inside("run", "open.py:mapped", '{"items": [1, 2]}', "-q")
    assert json.loads(done.out)["sums"] == [{"n": 2}, {"n": 4}]
    fails(inside("run", "open.py:mapped", '{"items": 1}'), 2, "items: Input should be a valid ")
    assert json.loads(inside("run", "open.py:same", GOOD, "-q").out) == {"n": 1}
    assert json.loads(inside("run", "open.py:empty", '{"a": 1}', "-q").out) == {"a": 1}
    fails(inside("run", "open.py:empty", "3"), 2, "INPUT is no JSON object")


@pytest.mark.parametrize(
    ("words", "report"),
    [
        (["shwo"], "did you mean 'show'?"),
        (["run"], "missing argument"),
        (["runs", "--limit", "0"], "--limit"),
        (["runs", "--nope"], "no such option"),
        (["run", "sums.py:pipeline", GOOD, "--budget-usd", "nan"], "must be a finite number, got nan"),
        (["run", "sums.py:pipeline", GOOD, "--drain", "-1"], "-1.0 is not in the range"),
        (["worker", "sums.py:pipeline", "--drain", "inf"], "must be a finite number, got inf"),
        (["drive", "x", "sums.py:pipeline", "--max-seconds", "nan"], "must be a finite number, got nan"),
        (["record", "x", "sums.py:pipeline", "--as-test", ""], "--as-test needs the name of a file"),
        (["run", "sums.py:pipeline", GOOD, "--budget-tokens", "-1"], "--budget-tokens"),
        (["run", "sums.py:pipeline", GOOD, "--run-id", ""], "must not be empty"),
        (["run", "sums.py:pipeline", GOOD, "--resume"], "--resume needs --run-id"),
        (["run", "sums.py:pipeline", GOOD, "--db", "mysql://x"], "--db mysql://x"),
        (["runs", "--db", "memory://"], "is not durable: it is lost when its process ends"),
        (["budget", "x", "--cost-usd", "nan", "--db", "runs.db"], "must be a finite number"),
    ],
)
def test_usage(inside, fails, words, report):
    """A call that cannot be meant is exit code 2 and names its help."""
    fails(inside(*words), 2, report)


@pytest.mark.parametrize("words", [[], ["telemetry"]])
def test_a_group_without_a_command(inside, words):
    """`stroma` alone prints its help as `stroma --help` does; click before 8.2 prints it to stdout."""
    done = inside(*words)
    assert (done.out or done.err).splitlines() == inside(*words, "--help").out.splitlines()


@pytest.mark.slow
def test_no_stdin(stroma):
    """A stdin that is closed is no empty input."""
    done = stroma.line("exec 0<&-; exec stroma run sums.py:pipeline -")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("stroma: cannot read the input from stdin")


def test_files_that_are_no_store(stroma, inside, fails):
    """A text file, another program's database, a damaged store, a directory: told apart and unchanged."""
    text = stroma.file("text.db", "x" * 5000)
    run = ("run", "sums.py:pipeline", GOOD, "-q")
    for words in (run, ["runs"], ["show", "last"]):
        fails(inside(*words, "--db", "text.db"), 3, "is not an SQLite database")
    assert text.read_text() == "x" * 5000
    with sqlite3.connect(stroma.home / "theirs.db") as theirs:
        theirs.execute("CREATE TABLE t (x)")
    fails(inside(*run, "--db", "theirs.db"), 3, "of another program")
    fails(inside(*run, "--db", "no/dir/x.db"), 3, "there is no directory")
    fails(inside("runs", "--db", "."), 3, "--db . is a directory")
    done = inside(*run, env={"XDG_DATA_HOME": str(stroma.home / "text.db")})
    fails(done, 3, "cannot create the directory of the store", "--db FILE")
    assert stroma.calls() == []

    assert inside("run", "sums.py:pipeline", GOOD, "--db", "store.db").code == 0
    store = stroma.home / "store.db"
    data = bytearray(store.read_bytes())
    data[4096:] = b"\xff" * len(data[4096:])
    store.write_bytes(data)
    fails(inside("runs", "--db", "store.db"), 3, "store.db is damaged")


def test_a_locked_store(stroma, inside, fails, ran, monkeypatch):
    """A store that another process holds is waited for, and then named."""
    ran("a", "--db", "x.db")
    monkeypatch.setattr(SQLiteStore, "_patience_seconds", 0.2)
    holder = sqlite3.connect(stroma.home / "x.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    done = inside("run", "sums.py:pipeline", GOOD, "--db", "x.db", "-q")
    holder.execute("ROLLBACK")
    holder.close()
    assert done.code == 3
    assert done.err.startswith("stroma: database is locked: another process has held ")
    assert stroma.calls() == ["first", "second", "third"]


# A module's bytecode that is cut off by the limit would break every later import of it.
NO_BYTECODE = {"PYTHONDONTWRITEBYTECODE": "1"}


def _small_files(limit):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@pytest.mark.slow
def test_a_full_disk_at_the_start(stroma, fails):
    """A disk with no room for the store ends before any node is called."""
    done = stroma("run", "sums.py:pipeline", GOOD, "-q", preexec_fn=_small_files(8192), env=NO_BYTECODE)
    fails(done, 3, "the disk")
    assert stroma.calls() == []


@pytest.mark.slow
def test_a_full_disk_on_the_way(stroma):
    """A disk that fills up stops the run, with 3; once there is room, resume calls only what was not kept."""
    stroma.file(
        "big.py",
        """
        from sums import *
        class Big(BaseModel):
            text: str
        async def swell(state):
            called("swell")
            return {"text": "x" * 3_000_000}
        pipeline = Pipeline("big", [first, node("swell", swell, Sum, Big)])
        """,
    )
    done = stroma(
        "run", "big.py:pipeline", GOOD, "--run-id", "big", preexec_fn=_small_files(1_000_000), env=NO_BYTECODE
    )
    assert (done.code, done.out) == (3, "")
    assert "Traceback" not in done.err
    assert "why: StoreError: the disk " in done.err
    assert "fix the store, then resume with: stroma resume big big.py:pipeline" in done.err
    assert stroma.calls() == ["first", "swell"]
    resumed = stroma("resume", "big", "big.py:pipeline", "-q")
    assert resumed.code == 0
    assert len(json.loads(resumed.out)["text"]) == 3_000_000
    assert stroma.calls() == ["first", "swell", "swell"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("postgresql://me:a@b:c/d@host:1/db?x=y", "postgresql://me:***@host:1/db?x=y"),
        ("redis://:pass@host/0", "redis://:***@host/0"),
        ("redis://host:6379/0?password=a%40b&db=1", "redis://host:6379/0?password=***&db=1"),
        ("postgresql://host/db?sslpassword=a&user=b", "postgresql://host/db?sslpassword=***&user=b"),
        ("postgresql://me@host:5432/db", "postgresql://me@host:5432/db"),
        ("sqlite:///a:b@c.db", "sqlite:///a:b@c.db"),
        ("runs.db", "runs.db"),
        ("host=h password=geheim", "host=h password=***"),
        ("host=h password = 'ge heim\\' x' user=me", "host=h password = *** user=me"),
        ("password='never closed user=me", "password=***"),
        ("redis://host?passwd=a b&db=1", "redis://host?passwd=***&db=1"),
        ("redis://host?TOKEN=a&x=1&pass%77ord=b", "redis://host?TOKEN=***&x=1&pass%77ord=***"),
        ("sqlite:///x.db?token=a&synchronous=full", "sqlite:///x.db?token=***&synchronous=full"),
        (
            "postgresql://me:a@host/db?passfile=/x&sslpassword='a b'",
            "postgresql://me:***@host/db?passfile=/x&sslpassword=***",
        ),
    ],
)
def test_masks(value, shown):
    """What may be a password is masked, whatever characters it holds; all else is shown as it is."""
    assert stores.mask_passwords(value) == shown


def test_a_driver_that_is_not_installed(inside, fails, monkeypatch):
    """A store whose driver is missing is 3, with the line that installs it."""
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.setitem(sys.modules, "redis", None)
    fails(inside("runs", "--db", "postgresql://host/db"), 3, "pip install 'stroma-runner[postgres]'")
    done = inside("runs", "--db", "redis://:geheim@host/0")
    fails(done, 3, "redis://:***@host/0", "pip install 'stroma-runner[redis]'")


@pytest.mark.slow
def test_a_message_fits_a_narrow_terminal(stroma):
    """A message is broken at spaces, and the command that fixes it where a shell takes it in parts."""
    command = ["stroma", "show", "a_run_that_nobody_has_started", "--db", "the_runs_of_november.db"]
    code, emulator, _ = run_on_terminal(command, stroma.home, stroma.env, columns=40)
    assert (code, emulator.wrapped) == (4, 0)
    assert emulator.text.splitlines()[:2] == ["stroma: store the_runs_of_november.db", "    does not exist"]
    assert "    stroma run FILE.py:NAME \\" in emulator.text.splitlines()


PLAIN = """
    from stroma import *
    from sums import Sum, first, node, second

    async def reads(state, ctx):
        return state

    runner = StromaRunner.quick()
    agent = Pipeline("agent", [node("reads", reads, Sum)])
    grouped = Pipeline("grouped", [parallel(first, second)])
"""


@pytest.mark.parametrize(
    ("words", "code", "report"),
    [
        (("completion", "x"), 2, "invalid value for 'SHELL': 'x' is not one of 'bash'"),
        (("run", "plain.py:runner"), 2, "it has plain.py:agent, plain.py:grouped"),
        (("worker", "plain.py:grouped", "--db", "x.db"), 2, "start it with a node"),
        (("submit", "plain.py:grouped", "{}", "--db", "x.db"), 2, "start it with a node"),
        (("ui", "--db", "nope.db"), 4, "store nope.db does not exist"),
        (("check", "plain.py:agent"), 0, "set RunConfig(context=...) on the pipeline"),
    ],
)
def test_a_mistake_is_named_in_plain_words(stroma, inside, words, code, report):
    """Messages say which pipeline, which shell and which input is missing."""
    stroma.file("plain.py", PLAIN)
    done = inside(*words)
    assert (done.code, report in done.err) == (code, True), done
    assert not (stroma.home / "nope.db").exists()
