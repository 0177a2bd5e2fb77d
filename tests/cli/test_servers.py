"""--db with a server: PostgreSQL and Redis."""

import json
import re
import shlex

import pytest

pytest.importorskip("psycopg")
pytest.importorskip("redis")

from stroma.checkpoint.postgres.store import PostgresStore
from stroma.checkpoint.redis.store import RedisStore

GOOD = '{"start": 1}'


def test_a_store_on_a_server(url, stroma, inside, fails):
    """Every command works on PostgreSQL and Redis as it does on a file and names the store in its advice."""
    assert inside("runs", "--db", url).code == 0
    fails(inside("show", "last", "--db", url), 4, "no runs in ")
    env = {"SECOND": "raise TimeoutError"}
    failed = inside("run", "sums.py:pipeline", GOOD, "--run-id", "x", "--db", url, env=env)
    assert failed.code == 1
    go_on = re.search(r"resume with: stroma (resume .*)\n", failed.err)
    assert shlex.split(go_on[1]) == ["resume", "x", "sums.py:pipeline", "--db", url]
    done = inside(*shlex.split(go_on[1]), "-q")
    assert (done.code, json.loads(done.out)) == (0, {"n": 4})
    assert [
        r["run_id"] for r in json.loads(inside("runs", "--json", env={"STROMA_DB": url}).out)["runs"]
    ] == ["x"]
    assert "run       x\n" in inside("show", "last", "--db", url).out
    assert inside("cancel", "x", "--db", url).code == 0
    assert inside("run", "sums.py:pipeline", GOOD, "--run-id", "x", "--resume", "--db", url, "-q").code == 0
    assert stroma.calls() == ["first", "second", "second", "second", "third"]


def test_a_dry_run_on_a_server(url, stroma, ran, inside):
    """resume --dry-run reads a run of any store, and has what changed since."""
    ran("x", "--db", url, code=1, SECOND="raise TimeoutError")
    text = (stroma.home / "sums.py").read_text()
    changed = text.replace(
        "class Sum(BaseModel):\n    n: int", "class Sum(BaseModel):\n    n: int\n    m: int = 0"
    )
    (stroma.home / "sums.py").write_text(changed + "\n# changed\n")
    done = inside("resume", "x", "sums.py:pipeline", "--dry-run", "--json", env={"STROMA_DB": url})
    plan = json.loads(done.out)
    assert (done.code, plan["run_id"], plan["resumable"]) == (2, "x", False)
    assert [(c["at"], c["node_id"]) for c in plan["changes"]] == [("0", "first")]
    assert "it lacks 'm', which is new" in plan["changes"][0]["message"]
    assert stroma.calls() == ["first", "second", "second"]


def test_a_password_is_never_shown(postgres, inside, fails):
    """A password in the URL is in no message and no command; the user is told to give the same --db again."""
    postgres.execute("DROP SCHEMA IF EXISTS stroma CASCADE")
    host = postgres.socket.rpartition("/")[0]
    secret = f"postgresql://{postgres.user}:geheim@/postgres?host={host}"
    failing = {"SECOND": "raise TimeoutError"}
    shown = [
        inside("run", "sums.py:pipeline", GOOD, "--run-id", "x", "--db", secret, env=failing),
        inside("run", "sums.py:pipeline", GOOD, "--db", secret, "--json", env=failing),
        inside("run", "sums.py:pipeline", GOOD, "--run-id", "y", env=failing | {"STROMA_DB": secret}),
        inside("show", "x", "--db", secret),
        inside("show", "nope", "--db", secret),
        inside("runs", "--status", "running", "--db", secret),
        inside("runs", "--db", "postgresql://me:geheim@h:port/x?passwort=1&password=geheim"),
        inside("runs", "--db", "redis://me:geheim/x@host:1/0"),
        inside("runs", "--db", "mysql://me:geheim@host/0"),
    ]
    assert "geheim" not in "".join(done.out + done.err for done in shown)
    assert [done.code for done in shown] == [1, 1, 1, 0, 4, 0, 2, 2, 2]
    assert "resume with: stroma resume x sums.py:pipeline  (with the same --db)\n" in shown[0].err
    assert re.fullmatch(r"stroma resume \w+ sums.py:pipeline", json.loads(shown[1].out)["resume"])
    assert "stroma resume y sums.py:pipeline\n" in shown[2].err
    assert "in postgresql://" in shown[4].err
    assert ":***@" in shown[4].err


def test_a_server_that_cannot_be_used(inside, fails, monkeypatch):
    """A server that cannot be reached is 3, and is named without its password."""
    for store, url in (
        (PostgresStore, "postgresql://me:geheim@127.0.0.1:1/db"),
        (RedisStore, "redis://:geheim@127.0.0.1:1/0"),
    ):
        monkeypatch.setattr(store, "_patience_seconds", 0.1)
        for words in (["runs"], ["show", "last"], ["run", "sums.py:pipeline", GOOD, "-q"]):
            done = inside(*words, "--db", url)
            fails(done, 3, "127.0.0.1:1")
            assert "geheim" not in done.err
