"""What is in the distribution, and what the repository's own tools promise."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from tests.kit import words

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TELEMETRY = ("otel", "prometheus", "datadog", "sentry")


def is_of_this_clone() -> bool:
    """Return True if ./dev of this clone made the environment: one of another clone would be changed."""
    installed = metadata.distribution("stroma-runner").read_text("direct_url.json") or ""
    return Path(sys.prefix, "dev-stamp").exists() and f'"{ROOT.as_uri()}"' in installed


needs_own_environment = pytest.mark.skipif(
    not is_of_this_clone(), reason="this environment was not made by ./dev of this clone"
)


def requirement_name(requirement: str) -> str:
    result = re.match(r"[\w.-]+", requirement)
    return result.group().lower().replace("_", "-")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    target = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = target.glob("stroma_runner-*.whl")
    return zipfile.ZipFile(path)


def test_wheel_has_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    """The wheel has the type marker and every file under src/stroma, and no other package."""
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    source = ROOT / "src"
    entries = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "stroma/py.typed" in names
    assert names == entries


def test_wheel_has_the_licence(wheel: zipfile.ZipFile) -> None:
    """The licence goes with the wheel."""
    (name,) = [name for name in wheel.namelist() if name.endswith("/licenses/LICENSE")]
    assert b"The Stroma authors" in wheel.read(name)


def test_core_dependencies() -> None:
    """Installing stroma without extras brings pydantic and genai-prices, nothing else."""
    core = [line for line in metadata.requires("stroma-runner") or [] if "extra ==" not in line]
    assert {requirement_name(line) for line in core} == {"pydantic", "genai-prices"}


def test_command_is_declared() -> None:
    """The distribution brings the command `stroma`, and the plugin of pytest."""
    points = {
        result.group: result.value
        for result in metadata.distribution("stroma-runner").entry_points
        if result.name == "stroma"
    }
    assert points == {"console_scripts": "stroma.cli:main", "pytest11": "stroma.testing.plugin"}


def test_core_imports_no_optional_dependency() -> None:
    """`import stroma` with every public name loaded needs no package but the core's own."""
    optional = {
        requirement_name(requirement).replace("-", "_")
        for extra in PYPROJECT["project"]["optional-dependencies"].values()
        for requirement in extra
    } - {"stroma_runner"}
    code = (
        "import sys, stroma\n"
        "for name in stroma.__all__: getattr(stroma, name)\n"
        f"print(sorted({optional | {'opentelemetry'}!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_a_runner_loads_no_more_than_a_run_needs() -> None:
    """The import that every service begins with loads no durable store and nothing that shows runs."""
    code = "import sys; from stroma import StromaRunner; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "stroma.runner" in loaded
    rooms = words("adapters cli demo drivers telemetry testing ui middleware temporal wire")
    parts = words("""
        checkpoint.durable checkpoint.history checkpoint.memory.store checkpoint.payloads
        checkpoint.postgres checkpoint.records checkpoint.redis checkpoint.sql checkpoint.sqlite
        contracts.checks contracts.repair_prompt contracts.untyped limits.gate limits.reservations
        runner.groups runner.items runner.map runner.steps runner.stream
        trace.gantt trace.html trace.story trace.terminal _utils.svg
    """)
    for name in rooms + parts:
        assert f"stroma.{name}" not in loaded, name
    assert not loaded & {"sqlite3", "genai_prices", "html", "pydantic.networks", "pydantic.root_model"}


def test_lock_is_portable() -> None:
    """Every locked requirement has a pinned version and a hash, and the lock names no address."""
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    entries = re.split(r"\n(?=\S)", text.strip())[1:]
    assert len(entries) > 20
    for entry in entries:
        assert re.match(r"[\w.-]+(\[[\w,]+\])?==\S+", entry), entry
        assert "--hash=sha256:" in entry, entry


def test_lock_covers_the_core_and_the_demo() -> None:
    """What the core, the command line and the demo need is locked, and heavy integrations are not."""
    text = (ROOT / "requirements.lock").read_text()
    locked = set(re.findall(r"^([\w.-]+)==", text, re.MULTILINE))
    assert locked >= {"pydantic", "genai-prices", "click", "rich", "openai", "uv", "hatchling"}
    assert not locked & {"stroma", "stroma-runner", "crewai"}


def test_lock_covers_telemetry() -> None:
    """Every system that telemetry goes to is locked, so each integration is tested against the real one."""
    text = (ROOT / "requirements.lock").read_text()
    locked = set(re.findall(r"^([\w.-]+)==", text, re.MULTILINE))
    extras = PYPROJECT["project"]["optional-dependencies"]
    wanted = {requirement_name(line) for name in TELEMETRY for line in extras[name]}
    assert wanted <= locked


def test_telemetry_packages_do_nothing_unasked(request: pytest.FixtureRequest) -> None:
    """An installed ddtrace changes no process, nor these tests: no module, hook or thread."""
    code = (
        "import sys, threading\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'ddtrace', 'datadog', "
        "'sentry_sdk'}),\n"
        "      [hook for hook in sys.meta_path if type(hook).__module__.startswith('ddtrace')], "
        "threading.active_count())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[] [] 1", "")
    assert not request.config.pluginmanager.has_plugin("ddtrace")


def test_the_lock_of_uv_is_ignored_by_git() -> None:
    """uv.lock records the addresses of one machine's index, so git ignores it."""
    assert "/uv.lock" in (ROOT / ".gitignore").read_text().splitlines()


class TestDev:
    """The script that prepares the environment and runs things in it."""

    def dev(
        self, *args: str, python: str = sys.executable, **variables: str
    ) -> "subprocess.CompletedProcess[str]":
        env = os.environ | {"DEV_VENV": sys.prefix} | variables
        command = [python, str(ROOT / "dev"), *args]
        return subprocess.run(
            command, env=env, cwd="/", capture_output=True, text=True, check=False, timeout=60
        )

    def test_help(self) -> None:
        """Without a command it lists the commands, and succeeds."""
        done = self.dev()
        assert (done.returncode, done.stderr) == (0, "")
        for command in ("demo", "test", "check", "bench", "lock", "run"):
            assert re.search(rf"^  {command} ", done.stdout, re.MULTILINE)

    def test_unknown_command(self) -> None:
        """An unknown command is a usage error in one line that lists the known ones."""
        done = self.dev("tset")
        assert done.returncode == 2
        assert done.stderr.startswith("dev: unknown command 'tset'; the commands are: ")
        assert done.stderr.count("\n") == 1

    def test_other_folder(self, tmp_path: Path) -> None:
        """A folder that is no environment is left alone."""
        (tmp_path / "precious").write_text("")
        done = self.dev("run", "true", DEV_VENV=str(tmp_path))
        assert done.returncode == 3
        assert "is not a virtual environment" in done.stderr
        assert (tmp_path / "precious").exists()

    @needs_own_environment
    def test_run_forwards(self) -> None:
        """`run` hands over arguments and the exit code, whatever other environment is active."""
        code = "import os, sys; print(sys.prefix, os.environ['VIRTUAL_ENV'], sys.argv[1:]); sys.exit(7)"
        done = self.dev("run", "python", "-c", code, "a b", VIRTUAL_ENV="/nowhere")
        assert done.stdout.strip() == f"{sys.prefix} {sys.prefix} ['a b']"
        assert (done.returncode, done.stderr) == (7, "")

    @needs_own_environment
    def test_no_tests_is_a_failure(self) -> None:
        """`test` fails if no test ran."""
        done = self.dev("test", "-n0", "-k", "no_test_has_this_name", "tests/project/test_package.py")
        assert done.returncode == 5
