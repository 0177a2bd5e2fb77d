"""Annotations of the functions behind nodes and flows: source of their contracts, or compared with them."""

from __future__ import annotations

import inspect
import operator
import types
import typing
from collections.abc import Callable
from typing import Any, Union

from pydantic import BaseModel

from stroma.contracts.contract import NodeContract, NotDone, Unknown


def infer_contract(
    kind: str,
    node_id: str,
    func: Any,
    models: tuple[type[BaseModel] | None, type[BaseModel] | None],
    scope: types.FrameType | None,
    **options: Any,
) -> NodeContract[Any, Any]:
    """Return the contract of a function: the models that are passed, else those of its annotations.

    Raises TypeError if neither names a model, or if they differ; see :func:`check_annotations`. An output may
    be annotated as a tuple that begins with the model.

    Args:
        kind: "node", or "flow" for a function whose state is its second parameter.
        node_id: id of the contract.
        func: the function.
        models: those of input and output; None: as annotated.
        scope: the frame that decorates, for annotations that are strings.
        options: other fields of the contract.
    """
    name, position = f"{kind} {node_id!r}", int(kind == "flow")
    bare = inspect.unwrap(func)
    try:
        parameters = list(inspect.signature(bare).parameters)
    except (TypeError, ValueError):  # A builtin has no signature.
        parameters = []
    is_method = parameters[:1] in (["self"], ["cls"])
    if isinstance(func, classmethod) or (models[0] is None and is_method):
        raise TypeError(
            f"{name} is marked inside its class; mark a bound method, as in runner.{kind}(obj.method)"
        )
    taken = annotation_of(bare, parameters[position], scope) if len(parameters) > position else Any
    contract: NodeContract[Any, Any] = NodeContract(
        node_id=node_id,
        input_schema=_model_of(name, "input", models[0], taken),
        output_schema=_model_of(name, "output", models[1], _output_of(annotation_of(bare, "return", scope))),
        **options,
    )
    check_annotations(name, func, contract, scope, position)
    return contract


def _model_of(name: str, what: str, passed: Any, annotated: Any) -> type[BaseModel]:
    model = annotated if passed is None else passed
    if isinstance(model, type) and issubclass(model, BaseModel):
        return model
    if passed is None:
        if isinstance(annotated, str):
            raise TypeError(
                f"{name} is annotated with {annotated} as {what}, which cannot be resolved where it is "
                f"defined; pass {what}="
            )
        where = "parameter" if what == "input" else "return value"
        problem = f"has no {what} model"
        if annotated is not Any:
            problem = f"is annotated with {_shown(annotated)} as {what}, which is not a pydantic model"
        raise TypeError(f"{name} {problem}; annotate the {where} with one, or pass {what}=")
    raise TypeError(f"{name}: {what}= must be a pydantic model, got {passed!r}")


def _output_of(annotation: Any) -> Any:
    """Return the annotation of the output: the first in a tuple, since the others are usage."""
    if typing.get_origin(annotation) is tuple and typing.get_args(annotation):
        return typing.get_args(annotation)[0]
    return annotation


def check_annotations(
    name: str, func: Any, contract: NodeContract[Any, Any], scope: types.FrameType | None, position: int = 0
) -> None:
    """Raise TypeError if a function, or its ``reconcile``, is annotated with another model than its contract.

    Accept whatever is not certainly wrong: no annotation, one that cannot be resolved, one that is not a
    model, a base or a subclass of the model, a union with one of these.

    Args:
        name: "node 'a'", for the message.
        func: the function. Other callables are not compared, nor are functions that a decorator wraps.
        contract: the contract that the decorator received.
        scope: the frame that decorates, for annotations that are strings.
        position: that of the state among the parameters, from 0.
    """
    if contract.reconcile is not None:
        _compare_function(f"reconcile of {name}", contract.reconcile, contract, scope, 0)
    _compare_function(name, func, contract, scope, position)


def _compare_function(
    name: str, func: Any, contract: NodeContract[Any, Any], scope: types.FrameType | None, position: int
) -> None:
    if type(func) is types.MethodType:
        func, position = func.__func__, position + 1
    if type(func) is not types.FunctionType or {"__wrapped__", "__signature__"} & vars(func).keys():
        return
    if func.__code__.co_argcount > position:
        taken = annotation_of(func, func.__code__.co_varnames[position], scope)
        _compare(name, "input", contract.input_schema, taken)
    _compare(name, "output", contract.output_schema, _output_of(annotation_of(func, "return", scope)))


def annotation_of(func: Callable[..., Any], name: str, scope: types.FrameType | None) -> Any:
    """Return the annotation of a parameter, or of "return"; Any without one, text for an unknown name.

    ``scope``: the frame that the function was defined in, if it is known.
    """
    annotation: Any = None
    try:
        annotation = func.__annotations__.get(name, Any)  # From Python 3.14 on this resolves it.
        namespaces = _namespaces_of(func, scope)

        def resolved() -> None: ...

        resolved.__annotations__ = {name: annotation}
        return typing.get_type_hints(resolved, *namespaces)[name]
    except NameError as error:  # A name that is known to type checkers only, or not yet.
        return annotation if isinstance(annotation, str) else str(error.name)
    except Exception:
        return Any


def _namespaces_of(
    func: Callable[..., Any], scope: types.FrameType | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the global and local names that annotations of a function can mean; empty if uncertain."""
    names: dict[str, Any] = getattr(func, "__globals__", {})
    outer = func.__qualname__.rpartition(".")[0]
    if not outer:
        return names, {}
    if scope is None or scope.f_globals is not names or _inside(scope) != outer:
        if "<locals>" in outer:
            return {}, {}
        # The method of a class that exists: a name that the class has too may be either.
        in_class = vars(operator.attrgetter(outer)(types.SimpleNamespace(**names)))
        return {name: names[name] for name in names.keys() - in_class}, {}
    local = dict(scope.f_locals)
    # Further out there are functions whose names this frame does not show.
    is_deep = outer.count("<locals>") > outer.endswith("<locals>")
    return ({} if is_deep else names), local


def _inside(scope: types.FrameType) -> str:
    """Return the beginning of the qualified names of what is defined in a frame."""
    code = scope.f_code
    return f"{code.co_qualname}.<locals>" if code.co_flags & inspect.CO_OPTIMIZED else code.co_qualname


def _compare(name: str, side: str, model: type[BaseModel], annotation: Any) -> None:
    if _may_be(annotation, model):
        return
    shown, passed = _shown(annotation), model.__name__
    if shown == passed:
        shown, passed = f"{annotation.__module__}.{shown}", f"{model.__module__}.{passed}"
    raise TypeError(f"{name} has {side}={passed}, and its function is annotated with {shown}; let them agree")


def _shown(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _may_be(annotation: Any, model: type[BaseModel]) -> bool:
    """Return False if an annotation certainly means other models."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        others = (types.NoneType, NotDone, Unknown)
        members = [one for one in typing.get_args(annotation) if one not in others]
        return not members or any(_may_be(one, model) for one in members)
    if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return True
    return (
        issubclass(model, annotation)
        or issubclass(annotation, model)
        # Defined again, in a notebook or by a reload.
        or (annotation.__module__, annotation.__qualname__) == (model.__module__, model.__qualname__)
    )
