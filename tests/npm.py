"""Packages from npm by a lock file: test data, no part of the project."""

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

_KEPT = Path(__file__).parents[1] / ".cache"


def missing(what: str) -> None:
    """Skip a test here; where all must run, fail it."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


@functools.cache
def npm_packages(folder: Path) -> Path | None:
    """Install what a folder's lock file names, once for each state of it; None where that cannot be done."""
    lock = (folder / "package-lock.json").read_bytes()
    home = _KEPT / f"npm-{hashlib.sha256(lock).hexdigest()[:16]}"
    _KEPT.mkdir(exist_ok=True)
    with (_KEPT / "npm.lock").open("w") as file:  # Other workers want them too.
        fcntl.flock(file, fcntl.LOCK_EX)
        if (home / "done").exists():
            return home
        npm = shutil.which("npm")
        if npm is None:
            return None
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        for name in ("package.json", "package-lock.json"):
            shutil.copy(folder / name, home)
        # The hashes of the lock file are checked; no script of a package is run.
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=300)
        if done.returncode:
            print(done.stderr[-2000:])
            return None
        (home / "done").touch()
    return home
