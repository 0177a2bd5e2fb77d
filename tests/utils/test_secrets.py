"""The finder of secrets: where it looks, how far, and what is shown where it cannot look."""

import dataclasses
import gc
import traceback
from collections import ChainMap, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from pydantic import (
    BaseModel,
    ConfigDict,
    PrivateAttr,
    RootModel,
    Secret,
    SecretBytes,
    SecretStr,
    create_model,
)

from stroma._utils.secrets import (
    MASK,
    MAX_DEPTH,
    MAX_ITEMS,
    MAX_SECRETS,
    UNSEARCHED,
    Secrets,
    find_secrets,
    may_hold_secrets,
)

KEY = "sk-live-0123456789"
HELD = SecretStr(KEY)


class Model(BaseModel):
    x: Any = None


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")


class Private(BaseModel):
    _key: SecretStr = PrivateAttr(default=HELD)


class Root(RootModel[list[SecretStr]]):
    pass


@dataclasses.dataclass
class Record:
    x: Any


@dataclasses.dataclass(slots=True)
class Slotted:
    x: Any


class Plain:
    def __init__(self, x: Any) -> None:
        self.x = x


class Slots:
    __slots__ = ("x",)

    def __init__(self, x: Any) -> None:
        self.x = x


class MyDict(dict[Any, Any]):
    pass


class MyList(list[Any]):
    pass


def secret(value: Any) -> Any:
    class Hidden(BaseModel):
        value: Secret[Any]

    return Hidden(value=value).value


def nested(value: Any, levels: int) -> Any:
    for _ in range(levels):
        value = [value]
    return value


def with_attribute(value: Any, name: str, attribute: Any) -> Any:
    setattr(value, name, attribute)
    return value


def noted(*args: Any, cause: BaseException | None = None) -> BaseException:
    error = ValueError(*args)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        (SecretStr("one"), {"one"}),
        (SecretStr(""), set()),
        (SecretBytes(b"one"), {"one"}),
        (SecretBytes(b""), set()),
        (SecretBytes(b"\xffraw"), {"raw", "\\xffraw"}),
        (SecretBytes(b"a'b\n"), {"a'b\n", "a'b\\n"}),
        (Record, set()),
        (Model, set()),
        ("plain", set()),
        (None, set()),
        (secret("one"), {"one"}),
        (secret(None), set()),
        (secret(True), set()),
        (secret(0), {"0"}),
        (secret(7.5), {"7.5"}),
        (secret(["one", b"two", None, False, ("three", {"key": "four"})]), {"one", "two", "three", "four"}),
        (secret(Record("one")), {"one"}),
        (secret(Model(x={"key": "one"})), {"one"}),
    ],
)
def test_every_text_that_a_secret_hides(value: Any, texts: set[str]) -> None:
    """All texts of a secret are found, bytes in the two forms that messages have; no flags, no keys."""
    assert find_secrets(value) == texts


PLACES: dict[str, Callable[[], Any]] = {
    "list": lambda: [HELD],
    "tuple": lambda: (HELD,),
    "set": lambda: {HELD},
    "frozenset": lambda: frozenset({HELD}),
    "deque": lambda: deque([HELD]),
    "value of a dict": lambda: {"k": HELD},
    "key of a dict": lambda: {HELD: 1},
    "subclass of dict": lambda: MyDict(k=HELD),
    "subclass of list": lambda: MyList([HELD]),
    "attribute of a dict": lambda: with_attribute(MyDict(), "key", HELD),
    "attribute of a list": lambda: with_attribute(MyList(), "key", HELD),
    "defaultdict": lambda: defaultdict(list, k=HELD),
    "OrderedDict": lambda: OrderedDict(k=HELD),
    "UserDict": lambda: UserDict(k=HELD),
    "ChainMap": lambda: ChainMap({}, {"k": HELD}),
    "MappingProxyType": lambda: MappingProxyType({"k": HELD}),
    "SimpleNamespace": lambda: SimpleNamespace(k=HELD),
    "partial": lambda: partial(print, HELD),
    "iterator": lambda: iter([HELD]),
    "model": lambda: Model(x=HELD),
    "extra of a model": lambda: Open(y=HELD),
    "private attribute of a model": Private,
    "root model": lambda: Root([HELD]),
    "dataclass": lambda: Record(HELD),
    "dataclass with slots": lambda: Slotted(HELD),
    "beside the fields of a dataclass": lambda: with_attribute(Record(1), "token", HELD),
    "object": lambda: Plain(HELD),
    "object with slots": lambda: Slots(HELD),
    "argument of an exception": lambda: noted("x", HELD),
    "attribute of an exception": lambda: with_attribute(ValueError(), "key", HELD),
    "cause of an exception": lambda: noted("x", cause=noted(HELD)),
    "member of a group": lambda: ExceptionGroup("x", [noted(HELD)]),
}


@pytest.mark.parametrize("place", PLACES)
def test_secrets_are_found_in_every_place(place: str) -> None:
    """Containers, models, dataclasses, exceptions and other objects are searched in all that they hold."""
    assert find_secrets(PLACES[place]()) == {KEY}
    assert find_secrets({"deep": [Model(x=(PLACES[place](),))]}) == {KEY}


def test_keys_and_attributes_that_a_schema_declares_are_secrets() -> None:
    """The plain value of a declared name is a secret, in a dict, a model, a dataclass or any other object."""

    class Login(BaseModel):
        password: SecretStr
        pin: int = 0

    for holder in (
        {"password": KEY},
        Model(x={"password": KEY}),
        Plain({"password": [KEY]}),
        Open(password=KEY),
        SimpleNamespace(password=KEY),
        {"deep": [{"password": {"inner": (KEY,)}}]},
    ):
        secrets = Secrets(Login, [holder])
        assert secrets.mask(f"401 for {KEY}, pin 4711") == f"401 for {MASK}, pin 4711"


def test_a_secret_is_found_a_hundred_levels_deep_and_deeper_nothing_is_known() -> None:
    """A value that is deeper than the limit is not searched in part: the answer is None."""
    assert find_secrets(nested(HELD, MAX_DEPTH)) == {KEY}
    assert find_secrets(nested(HELD, MAX_DEPTH + 2)) is None
    assert find_secrets(secret(nested("one", MAX_DEPTH - 1))) == {"one"}


def test_a_value_that_is_too_large_is_not_searched_in_part() -> None:
    """More values, or more secrets, than the limits hide every text that could quote one."""
    assert find_secrets([[HELD] for _ in range(MAX_ITEMS + 1)]) is None
    assert find_secrets([SecretStr(f"secret-{n}") for n in range(MAX_SECRETS + 1)]) is None
    secrets = Secrets()
    secrets.note([SecretStr(f"secret-{n:05}") for n in range(MAX_SECRETS)])
    assert secrets.mask("at secret-00000 and secret-09999 of x") == f"at {MASK} and {MASK} of x"
    secrets.note(SecretStr("one more"))
    assert secrets.mask("any text") == UNSEARCHED
    shown = secrets.mask_error(ValueError("any text"))
    assert str(shown) == UNSEARCHED
    assert type(shown).__name__ == "ValueError"


def test_large_plain_data_is_not_counted() -> None:
    """A state of a million plain values is searched, since plain values hold nothing."""
    assert find_secrets({"rows": [[n, "text"] for n in range(MAX_ITEMS)], "key": HELD}) == {KEY}


def test_cycles_are_searched_once() -> None:
    """A value that holds itself is searched, whatever the number of ways to it."""
    loop: list[Any] = [HELD]
    loop += [loop, [loop, loop], {"loop": loop}]
    assert find_secrets(loop) == {KEY}


class Endless(Mapping[Any, Any]):
    def __getitem__(self, key: Any) -> Any:
        return self

    def __iter__(self) -> Iterator[int]:
        n = 0
        while True:
            yield (n := n + 1)

    def __len__(self) -> int:
        raise RuntimeError("no length")


class EndlessList(list[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self


class Hostile(Exception):
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


@pytest.mark.parametrize("make", [Endless, lambda: EndlessList([1]), Hostile, lambda: iter(int, 1)])
def test_no_code_of_a_class_is_called(make: Callable[[], Any]) -> None:
    """Endless mappings, lists and iterators, and attributes that raise, neither stop nor narrow a search."""
    value = make()
    assert find_secrets([value, HELD]) == {KEY}
    assert Secrets(Model, [value]).mask("text") == "text"


def test_code_and_the_process_are_not_searched() -> None:
    """Modules, classes, functions, loggers, threads and loops in a context are not searched."""
    import asyncio
    import logging
    import threading

    loop = asyncio.new_event_loop()
    try:
        for value in (
            gc,
            Model,
            nested,
            logging.getLogger(),
            threading.current_thread(),
            loop,
            Plain(1).__init__,
        ):
            assert find_secrets({"held": value}) == set()
    finally:
        loop.close()


class WithSecret(BaseModel):
    key: SecretStr = SecretStr("")


class Harmless(BaseModel):  # Not of the kit: a class may hold what any subclass of it holds.
    n: int = 0


@pytest.mark.parametrize(("inner", "may"), [(Harmless, False), (WithSecret, True), (Private, True)])
@pytest.mark.parametrize("around", [list, dict, tuple, None])
def test_a_class_may_hold_the_secrets_of_the_classes_inside(inner: Any, may: bool, around: Any) -> None:
    """Models inside containers count: only a class that can hold no secret anywhere is not searched."""
    kind = {list: list[inner], dict: dict[str, inner], tuple: tuple[inner, ...], None: inner | None}[around]
    assert may_hold_secrets(create_model("Outer", field=(kind, ...))) is may


def printed(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


class NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Silent(Exception):
    def __str__(self) -> str:
        return "silent"


def chain(length: int, first: BaseException) -> BaseException:
    for n in range(length):
        outer = ValueError(f"outer {n}")
        outer.__cause__ = first
        first = outer
    return first


def from_context(error: BaseException, context: BaseException) -> BaseException:
    error.__context__ = context
    return error


ERRORS: dict[str, Callable[[], BaseException]] = {
    "message": lambda: ValueError(f"401 for {KEY}"),
    "second argument": lambda: with_attribute(Silent(), "args", ("x", KEY)),
    "attribute": lambda: with_attribute(Silent(), "detail", KEY),
    "note": lambda: with_attribute(ValueError("x"), "__notes__", [f"key {KEY}"]),
    "note that is not a list": lambda: with_attribute(ValueError("x"), "__notes__", KEY),
    "cause": lambda: chain(1, ValueError(KEY)),
    "twelfth cause": lambda: chain(12, ValueError(KEY)),
    "context": lambda: from_context(ValueError("x"), KeyError(KEY)),
    "context of one without a text": lambda: from_context(NoText(), KeyError(KEY)),
    "member of a group": lambda: ExceptionGroup("x", [ValueError("y"), ValueError(KEY)]),
    "message of a group": lambda: ExceptionGroup(KEY, [ValueError("y")]),
    "member of a member": lambda: BaseExceptionGroup(
        "x", [BaseExceptionGroup("y", [KeyboardInterrupt(KEY)])]
    ),
    "cause of a member": lambda: ExceptionGroup("x", [chain(2, ValueError(KEY))]),
    "line of source": lambda: SyntaxError("cannot evaluate", ("<template>", 1, 1, f"key = '{KEY}'")),
    "2,000th cause": lambda: chain(2000, ValueError(KEY)),
}


@pytest.mark.parametrize("place", ERRORS)
def test_a_traceback_is_printed_without_secrets(place: str) -> None:
    """What a log prints of an exception has no secret in it, and names its type, wherever the secret was."""
    secrets = Secrets(values=[HELD])
    error = ERRORS[place]()
    shown = secrets.mask_error(error)
    assert shown is not error
    assert KEY not in printed(shown)
    assert KEY not in repr(shown.args) + repr(vars(shown))
    assert type(shown).__name__ == type(error).__name__


def test_an_exception_that_tells_nothing_stands_for_itself() -> None:
    """The very exception is logged where nothing has to be taken out of its messages."""
    for error in (chain(1, KeyError("also plain")), ExceptionGroup("x", [ValueError("y")])):
        assert Secrets().mask_error(error) is error
        assert Secrets(values=[HELD]).mask_error(error) is error


@pytest.mark.parametrize("more", [0, 1])
def test_groups_are_shown_a_hundred_levels_deep(more: int) -> None:
    """A group is shown with its members down to the limit; a deeper one is named without them."""
    error: Exception = ValueError("y")
    for _ in range(MAX_DEPTH + more):
        error = ExceptionGroup("x", [error])
    assert ("too many causes" in str(Secrets().mask_error(error))) is bool(more)


def test_the_messages_of_a_traceback_are_single_lines() -> None:
    """A message, note or member with a line break cannot forge a line of a log."""
    forged = "no\nCRITICAL forged"
    for error in (
        ValueError(forged),
        ExceptionGroup("x", [ValueError(forged)]),
        chain(3, ValueError(forged)),
    ):
        text = printed(Secrets().mask_error(error))
        assert "no\\nCRITICAL forged" in text
        assert "\nCRITICAL" not in text
