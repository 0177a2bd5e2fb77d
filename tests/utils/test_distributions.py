"""The warning about the distribution `stroma`, which is another project's."""

import importlib.util
import shutil
import sys
import warnings
from pathlib import Path

import pytest

import stroma


def import_from(folder: Path) -> None:
    """Import the package, under another name, from a folder of packages that has its `__init__.py`."""
    spec = importlib.util.spec_from_file_location("stroma_elsewhere", folder / "stroma" / "__init__.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder of packages with ours in it, and what belongs to it."""
    (tmp_path / "stroma").mkdir()
    shutil.copy(stroma.__file__, tmp_path / "stroma")
    (tmp_path / "stroma_runner-0.4.0.dist-info").mkdir()
    (tmp_path / "stroma-notes").mkdir()
    return tmp_path


def test_the_first_import_warns_of_the_other_distribution(packages: Path) -> None:
    """The first import warns once if the distribution `stroma` is installed in the same folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import_from(packages)
    (packages / "stroma-0.3.1.dist-info").mkdir()
    with pytest.warns(UserWarning, match="another project") as seen:
        import_from(packages)
    assert [str(one.message) for one in seen] == [
        "the distribution 'stroma 0.3.1' is another project that installs files over those of stroma-runner; "
        "run: pip uninstall -y stroma stroma-runner && pip install stroma-runner"
    ]


def test_a_package_that_is_in_no_folder_imports(tmp_path: Path) -> None:
    """A package inside an archive, whose folder cannot be listed, imports without a warning."""
    from stroma._utils.distributions import find_other_distribution

    (tmp_path / "packages.zip").write_bytes(b"")
    assert find_other_distribution(str(tmp_path / "packages.zip")) is None
    assert find_other_distribution(str(tmp_path / "missing")) is None
