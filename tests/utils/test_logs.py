"""SafeLogger: every record is one line, whatever is passed."""

import io
import logging
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr, ValidationError

from stroma._utils.logs import SafeLogger, get_logger
from stroma.engine.redaction import Redactor, RunLogger
from stroma.trace.trace import ExecutionTrace

FORGED = "no\nCRITICAL forged\x1b[2J"
ESCAPED = "no\\nCRITICAL forged\\u001b[2J"
KEY = "sk-live-0123456789"


class Age(BaseModel):
    years: int


class Odd:
    def __str__(self) -> str:
        return FORGED

    __repr__ = __str__


class Broken(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What a file would have of the logger "stroma"."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(filename)s %(funcName)s %(message)s"))
    logger = logging.getLogger("stroma")
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("text", "argument", "written"),
    [
        ("%s", FORGED, ESCAPED),
        ("%s", ValueError(FORGED), ESCAPED),
        ("%s", Odd(), ESCAPED),
        ("%r", Odd(), ESCAPED),
        ("%r", "plain", "'plain'"),
        ("%(a)s", {"a": FORGED}, ESCAPED),
        ("%s", Broken(), "<Broken>"),
        ("%r", Broken(), "<Broken>"),
        ("%d", 7, "7"),
        ("%.1f", Decimal("7.25"), "7.2"),
        ("%s", None, "None"),
    ],
)
def test_an_argument_is_one_line(stream: io.StringIO, text: str, argument: Any, written: str) -> None:
    """Texts, exceptions and other objects are written in one visible line; numbers stay numbers."""
    get_logger().warning(text, argument)
    assert stream.getvalue() == f"WARNING test_logs.py test_an_argument_is_one_line {written}\n"


def test_refused_values_are_not_logged(stream: io.StringIO) -> None:
    """Of a ValidationError the log has the places and kinds of errors, and not the values."""
    with pytest.raises(ValidationError) as caught:
        Age.model_validate({"years": "patient 4711"})
    get_logger().warning("%s", caught.value)
    assert stream.getvalue().endswith(" the value does not fit Age: years (int_parsing)\n")


@pytest.mark.parametrize("how", ["exception", "exc_info", "error", "tuple"])
def test_a_traceback_cannot_forge_a_line(stream: io.StringIO, how: str) -> None:
    """Messages in tracebacks are single lines, whatever form exc_info has; the record names the caller."""
    logger = get_logger()
    try:
        raise ExceptionGroup("x", [ValueError(FORGED)])
    except ExceptionGroup as error:
        exc_info: Any = {
            "exc_info": True,
            "error": error,
            "tuple": (type(error), error, error.__traceback__),
        }.get(how)
        if how == "exception":
            logger.exception("it failed")
        else:
            logger.error("it failed", exc_info=exc_info)
    text = stream.getvalue()
    assert text.startswith("ERROR test_logs.py test_a_traceback_cannot_forge_a_line it failed\n")
    assert f"ValueError: {ESCAPED}" in text
    assert "\nCRITICAL" not in text
    logger.error("no exception", exc_info=True)
    assert stream.getvalue().endswith("no exception\nNoneType: None\n")


def test_the_logger_of_a_run_masks_its_secrets(stream: io.StringIO) -> None:
    """Arguments and tracebacks are written without secrets of the run, its context or the exception."""
    logger = RunLogger("r", Redactor(None, {"key": SecretStr(KEY)}, ExecutionTrace("r")))
    logger.error("first", exc_info=ExceptionGroup("x", [ValueError(KEY)]))
    logger.error("%s and %s", f"second {KEY}", ValueError(KEY))
    other = ValueError("also other-secret")
    other.held = SecretStr("other-secret")  # type: ignore[attr-defined]
    logger.error("third", exc_info=other)
    text = stream.getvalue()
    assert "second ********** and **********" in text
    assert KEY not in text
    assert "other-secret" not in text


def test_a_level_that_is_off_costs_no_text(stream: io.StringIO) -> None:
    """Nothing is made of arguments that nobody reads."""

    class Unread:
        def __str__(self) -> str:
            raise AssertionError("it was read")

    logger = SafeLogger(logging.getLogger("stroma"), {})
    logger.logger.setLevel(logging.ERROR)
    try:
        logger.warning("%s", Unread())
    finally:
        logger.logger.setLevel(logging.NOTSET)
    assert stream.getvalue() == ""
