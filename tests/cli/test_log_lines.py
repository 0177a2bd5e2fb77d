"""Log records that commands print."""

import logging
from collections.abc import Iterator

import pytest

from stroma.cli.progress import show_warnings

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
