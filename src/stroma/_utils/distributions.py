"""Installed packages, and the distribution `stroma`, another project with our import name.

Runs at each first import of the package, so it imports nothing that Python has not loaded by then.
"""

from __future__ import annotations

import os
import warnings

_PREFIX, _SUFFIX = "stroma-", ".dist-info"


def find_other_distribution(folder: str) -> str | None:
    """Return "stroma VERSION" if that distribution is in a folder of packages, else None. Never raises."""
    try:
        names = os.listdir(folder or os.curdir)
    except OSError:
        return None
    for name in names:
        # `stroma_runner-...` is this project's. importlib.metadata would take 20 ms here, a listing takes
        # 0.1.
        if name.lower().startswith(_PREFIX) and name.endswith(_SUFFIX):
            return f"stroma {name[len(_PREFIX) : -len(_SUFFIX)]}"
    return None


def reinstall_command() -> str:
    """Return the command that removes both distributions and installs this one."""
    return "pip uninstall -y stroma stroma-runner && pip install stroma-runner"


def installed_version(distribution: str) -> str | None:
    """Return the version of a distribution, or None where it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def missing(package: str, user: str, extra: str) -> ImportError:
    """Return the error of what needs the package of an extra that is not installed."""
    return ImportError(
        f"{package} is required for {user}; install it with: pip install 'stroma-runner[{extra}]'"
    )


def warn_of_other_distribution(package_file: str) -> None:
    """Warn if the distribution `stroma` is installed beside this package: they overwrite each other."""
    other = find_other_distribution(os.path.dirname(os.path.dirname(package_file)))
    if other is not None:
        warnings.warn(
            f"the distribution {other!r} is another project that installs files over those of stroma-runner; "
            f"run: {reinstall_command()}",
            stacklevel=3,  # the import statement
        )
