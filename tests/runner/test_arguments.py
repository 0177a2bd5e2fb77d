"""What may be given to a runner, and that anything else is told before a node is called."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.kit import Num, SimpleStore, computing

from stroma import (
    AsyncInMemoryStore,
    CheckpointManager,
    ContractRegistry,
    FailureClass,
    FallbackPolicy,
    InMemoryStore,
    NodeHooks,
    SQLiteStore,
    StromaRunner,
    open_store,
)


@pytest.mark.parametrize("form", [str, Path, "sqlite:///{}".format])
def test_a_runner_takes_the_url_or_path_of_a_store(tmp_path: Path, form: Any) -> None:
    file = tmp_path / "runs.db"
    runner = StromaRunner.quick(store=form(str(file)), run_id="r")
    add = runner.node("add", input=Num, output=Num)(computing(lambda state: Num(n=state.n + 1)))
    assert runner.run_sync([add], Num()).final_state == Num(n=1)
    record = SQLiteStore(file).get_run("r")
    assert record.status == "COMPLETED"


def test_a_url_that_names_no_store_is_told_at_once() -> None:
    with pytest.raises(ValueError, match="mysql:// stores are not available"):
        StromaRunner.quick(store="mysql://host/db")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("redis://:secret@host/0", "store must be a store, got str; pass open_store(url)"),
        (Path("runs.db"), f"store must be a store, got {type(Path()).__name__}; pass open_store(url)"),
        (
            AsyncInMemoryStore,
            "store must be an instance, got the class AsyncInMemoryStore; pass AsyncInMemoryStore(...)",
        ),
        ({}, "store must have save, load and delete, got dict"),
        (None, "store must have save, load and delete, got NoneType"),
    ],
)
def test_what_is_no_store_is_told_when_it_is_given(value: Any, text: str) -> None:
    """Not when the first output is to be kept, which is paid for by then; and no password is told with it."""
    with pytest.raises(TypeError) as caught:
        CheckpointManager(value)
    assert str(caught.value) == text


def test_every_store_is_one() -> None:
    for store in (InMemoryStore(), AsyncInMemoryStore(), open_store("memory://"), SimpleStore()):
        assert CheckpointManager(store).store is store


@pytest.mark.parametrize(
    "value",
    [print, [print], {"on_node_start": print}, "hooks", 5],
    ids=["function", "list", "dict", "text", "number"],
)
def test_what_is_no_set_of_hooks_is_told_when_it_is_given(value: Any) -> None:
    with pytest.raises(TypeError, match=r"is not a set of hooks; make one with NodeHooks\(\.\.\.\)$"):
        StromaRunner.quick(hooks=value)


quick = StromaRunner.quick
NAMED_CLASS = "the initial state must be an instance, got the class Num; pass Num"


async def no_classifier(exception: Exception, context: Any) -> None: ...


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: quick(node_timeouts={"a": 0.5}), ValueError, "got 0.5; pass 500 for 0.5 seconds"),
        (lambda: quick(node_timeouts={"a": timedelta(seconds=3)}), ValueError, "pass 3000 for 3 seconds"),
        (
            lambda: quick(contract_retries={"a": -1}),
            ValueError,
            r"contract_retries\.a\n  Input should be",
        ),
        (
            lambda: quick(classifiers=[FailureClass.TERMINAL]),
            TypeError,
            "pass a function of",
        ),
        (lambda: quick(classifiers=no_classifier), TypeError, "must be a list of functions"),
        (lambda: quick(classifiers=[no_classifier]), TypeError, "must not be async, got .*; define it"),
        (lambda: quick(redact=5), TypeError, "redact must be callable, got 5"),
        (lambda: NodeHooks(on_node_start=5), TypeError, "on_node_start must be callable, got 5"),
        (
            lambda: FallbackPolicy("a", "b", 80),
            ValueError,
            "must be a share from 0 to 1, got 80",
        ),
        (
            lambda: StromaRunner(ContractRegistry(), CheckpointManager(InMemoryStore()), {}),
            TypeError,
            r"config must be a RunConfig, got \{\}; pass RunConfig\(\.\.\.\)",
        ),
        (lambda: quick().run_sync([], Num), TypeError, NAMED_CLASS),
        (lambda: quick().node("a", input=Num, output=Num)(Num()), TypeError, "it is not callable"),
    ],
)
def test_a_setting_of_another_kind_is_refused_where_it_is_written(
    make: Callable[[], Any], error: type[Exception], text: str
) -> None:
    """A setting that cannot mean what was meant is an error that says what to pass."""
    with pytest.raises(error, match=text):
        make()
