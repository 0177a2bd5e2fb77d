"""The form that submits a run of the pipeline of `stroma ui`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from stroma._utils.text import clean
from stroma.contracts.examples import NoExampleError, example_for
from stroma.runner.pipeline import SubmitOptions
from stroma.ui.actions import identity_of, no_key, read_fields, to_run
from stroma.ui.rendering import Renderer

if TYPE_CHECKING:
    from stroma.ui.settings import Submission

__all__ = ["SubmitForm"]

#: Action and subject of the form.
_FORM: Final = ("submit", "")
_MAX_ERRORS: Final = 20


class SubmitForm:
    """Handlers of the form and of its submission, which only accept forms with a key of this process."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._keys = renderer.keys

    def page(self, request: Request) -> Response:
        """Return an empty form."""
        try:
            example = json.dumps(example_for(self._submission().model))
        except NoExampleError:
            example = "{}"
        return self._page({"key": self._keys.form(*_FORM), "input": example})

    async def submit(self, request: Request) -> Response:
        """Submit a run, once for a form and its content, and lead to its page; or show the errors."""
        form = dict(await read_fields(request))
        if not self._keys.is_form(form.get("key", ""), *_FORM):
            raise no_key()
        submission = self._submission()
        parsed = _parse(submission.model, form.get("input", ""))
        options = _read_options(form)
        errors = [
            *(parsed if isinstance(parsed, list) else ()),
            *(options if isinstance(options, list) else ()),
        ]
        if isinstance(parsed, list) or isinstance(options, list):
            return self._page(form, errors, 422)
        run_id = self._keys.id_of(form["key"], identity_of(form))
        try:
            await submission.submit(parsed, {**options, "run_id": run_id})
        except (TypeError, ValueError) as error:
            return self._page(form, [("", clean(str(error), 1000))], 422)
        return to_run(run_id)

    def _submission(self) -> Submission:
        submission = self._renderer.settings.submission
        if submission is None:
            raise HTTPException(404, "no pipeline that can be submitted was passed to stroma ui")
        return submission

    def _page(
        self, form: dict[str, str], errors: list[tuple[str, str]] | None = None, code: int = 200
    ) -> Response:
        fields = {name: form.get(name, "") for name in ("key", "input", "queue_key", "priority")}
        return self._renderer.page("submit.html", code, here="pipeline", form=fields, errors=errors or [])


def _parse(model: type[BaseModel], text: str) -> BaseModel | list[tuple[str, str]]:
    """Return the input in a text, or its errors: each the path of a field, and what is wrong with it."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        return [(".".join(map(str, one["loc"])), clean(one["msg"], 300)) for one in errors[:_MAX_ERRORS]]
    except Exception as error:  # A validator of the model may raise anything.
        return [("", clean(f"{type(error).__name__}: {error}", 300))]


def _read_options(form: dict[str, str]) -> SubmitOptions | list[tuple[str, str]]:
    """Return the priority and the key in a form, or their errors."""
    try:
        options: SubmitOptions = {"priority": int(form.get("priority", "").strip() or "0")}
    except ValueError:
        return [("priority", "not a whole number")]
    key = form.get("queue_key", "").strip()
    if key:
        options["key"] = key
    return options
