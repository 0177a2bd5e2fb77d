"""`stroma doctor` and `stroma completion`."""

import importlib.util
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from types import SimpleNamespace

import pytest

GOOD = '{"start": 1}'


def checks(done):
    data = json.loads(done.out)
    assert data["schema"] == "stroma.doctor/1"
    assert data["ok"] == (done.code == 0)
    return {one["check"]: one for one in data["checks"]}


def test_a_store_that_is_well(any_url, stroma, inside):
    """Every line is ok or a note with its mend: the store answers, its format, the clock, the extras."""
    assert checks(inside("doctor", "--json", "--db", any_url))["store"]["verdict"] == "ok"
    assert inside("run", "sums.py:pipeline", GOOD, "-q", "--db", any_url).code == 0
    done = inside("doctor", "--json", "--db", any_url)
    result = checks(done)
    assert done.code == 0
    system = {"sqlite": "SQLite 3", "postgresql": "PostgreSQL 1", "redis": "Redis "}[
        any_url.partition(":")[0]
    ]
    assert f"{system}" in result["store"]["message"]
    assert "has runs, answers in" in result["store"]["message"]
    assert {"store", "format", "clock", "[redis]", "[otel]"} <= set(result)
    assert result["format"]["message"].endswith("which this release writes")
    words = inside("doctor", "--db", any_url).out.splitlines()
    assert [line for line in words if not re.match(r"(ok|note|missing) +\S+ +\S|  +fix: \S", line)] == []


def test_what_is_wrong_names_its_mend(stroma, inside, monkeypatch, tmp_path):
    """No store, a deleted or newer one, a full disk, a directory that is not there: 3, with the fix."""
    stroma.file("text.db", "this is no database, but long enough to be looked at as one")
    done = inside("doctor", "--json", "--db", "text.db")
    assert done.code == 3
    assert "is not an SQLite database; use another path" in checks(done)["store"]["message"]
    done = inside("doctor", "--json", "--db", "no/such/x.db")
    assert done.code == 3
    assert "--db FILE" in checks(done)["store"]["fix"]
    done = inside("doctor", "--json", "--db", "mysql://x/y")
    assert done.code == 3
    assert checks(done)["store"]["verdict"] == "wrong"
    stroma.file("gone.db-wal", "")
    done = inside("doctor", "--json", "--db", "gone.db")
    assert (done.code, "was moved or deleted" in checks(done)["store"]["message"]) == (3, True)

    assert inside("run", "sums.py:pipeline", GOOD, "-q", "--db", "x.db").code == 0
    with sqlite3.connect(tmp_path / "x.db") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    newer = checks(inside("doctor", "--json", "--db", "x.db"))["store"]
    assert (newer["verdict"], "99" in newer["message"]) == ("wrong", True)

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    done = inside("doctor", "--json", "--db", "x.db")
    assert done.code == 3
    assert "stroma gc --older-than 30d --db x.db" in checks(done)["disk"]["fix"]


def test_a_package_that_is_not_installed(inside, monkeypatch):
    """An extra that is not installed is "missing", with the command that installs it, and no failed check."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "prometheus_client" else True
    )
    done = inside("doctor", "--json")
    assert done.code == 0
    assert checks(done)["[prometheus]"] == {
        "check": "[prometheus]",
        "verdict": "missing",
        "message": "Prometheus: not installed",
        "fix": "pip install 'stroma-runner[prometheus]'",
    }
    (line,) = [line for line in inside("doctor").out.splitlines() if "[prometheus]" in line]
    assert re.fullmatch(r"missing +\[prometheus\] +Prometheus: not installed; pip install '.*'", line)


def test_the_other_distribution(inside, monkeypatch, tmp_path):
    """The distribution `stroma` of another project is named with the command that repairs the packages."""
    assert "packages" not in checks(inside("doctor", "--json"))
    (tmp_path / "site" / "stroma-0.3.1.dist-info").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found = checks(inside("doctor", "--json"))["packages"]
    assert found["verdict"] == "note"
    assert "'stroma 0.3.1' is another project" in found["message"]
    assert found["fix"] == "pip uninstall -y stroma stroma-runner && pip install stroma-runner"


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(inside, shell):
    """The script of each shell calls this command back; bash takes it without an error."""
    done = inside("completion", shell)
    assert done.code == 0
    assert f"_STROMA_COMPLETE={shell}_complete" in done.out
    if shell == "bash" and (bash := shutil.which("bash")):
        checked = subprocess.run([bash, "-n"], input=done.out, text=True, capture_output=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, "")


def test_what_is_completed(capsys, inside, ran):
    """Commands, options and ids of runs are completed; an unreadable store is silent."""

    def complete(*words, **env):
        line = {
            "COMP_WORDS": " ".join(words),
            "COMP_CWORD": str(len(words) - 1),
            "_STROMA_COMPLETE": "bash_complete",
        }
        with pytest.raises(SystemExit):
            inside(env=line | env)
        printed, errors = capsys.readouterr()
        assert errors == ""
        return [item.partition(",")[2] for item in printed.split()]

    ran("alpha")
    ran("beta;rm")
    assert complete("stroma", "sho") == ["show"]
    assert complete("stroma", "runs", "--fai") == ["--failed"]
    assert complete("stroma", "show", "") == ["alpha"]
    assert complete("stroma", "diff", "alpha", "al") == ["alpha"]
    assert complete("stroma", "cancel", "al") == ["alpha"]
    assert complete("stroma", "budget", "al") == ["alpha"]
    assert complete("stroma", "show", "", STROMA_DB="sums.py") == []
    ran("gamma", "--db", "other.db")
    assert complete("stroma", "show", "", STROMA_DB="other.db") == ["gamma"]
    assert complete("stroma", "show", "--db", "other.db", "") == ["gamma"]
    assert complete("stroma", "show", "--db=other.db", "g") == ["gamma"]
