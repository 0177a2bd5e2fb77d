"""Forms that answer questions of runs, and state how calls of effects ended."""

from __future__ import annotations

import json
from typing import Any, Final

from anyio import to_thread
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from stroma._utils.text import clean
from stroma.checkpoint.entries import Waiting
from stroma.checkpoint.records import RunRecord
from stroma.contracts.contract import NotDone
from stroma.contracts.examples import example_text
from stroma.ui.actions import Actions, can_resume, identity_of, to_run
from stroma.ui.answer_fields import AnswerField, FieldError, fields_of, parse_fields
from stroma.ui.rendering import Renderer

_MAX_ERRORS: Final = 20


class AnswerForm:
    """The form that answers a question, or states the output of the call of an effect.

    Attributes:
        question: the question, as it is shown.
        fields: [] for an answer that is written as JSON.
        values: text of each field, by its name in the form.
        text: the answer as JSON.
        errors: what is wrong with it.
    """

    def __init__(
        self, question: Waiting, form: dict[str, str] | None = None, errors: list[FieldError] | None = None
    ) -> None:
        self.question = question
        self.fields: list[AnswerField] = fields_of(question.answer_schema())
        self.errors = errors or []
        self.values = form or {f"field:{field.name}": field.value for field in self.fields}
        self.text = example_text(question.answer_schema()) if form is None else form.get("answer", "")

    @property
    def title(self) -> str:
        """The question, or the call that is asked about."""
        one = self.question
        return one.reason if one.effect is None else f"Call {one.effect.number} of {one.node_id}"

    def errors_of(self, name: str) -> list[str]:
        """Return what is wrong with a field."""
        return [error.message for error in self.errors if error.name == name]

    @property
    def other_errors(self) -> list[FieldError]:
        """Errors of the answer that belong to no field of the form."""
        names = {field.name for field in self.fields} - {""}
        return [error for error in self.errors if error.name not in names]


class _Refused(Exception):
    """An answer that does not fit. It stays in the form."""

    def __init__(self, question: Waiting, errors: list[FieldError]) -> None:
        super().__init__()
        self.question, self.errors = question, errors


class Answers:
    """Handlers of the forms; each names its question, and is accepted once."""

    def __init__(self, renderer: Renderer, actions: Actions) -> None:
        self._renderer, self._actions = renderer, actions
        self._settings, self._keys = renderer.settings, renderer.keys

    async def approve(self, request: Request) -> Response:
        """Store an answer or statement, and resume the run if asked to; show a wrong one with its errors."""
        record, form = await self._actions.read_form("approve", request)
        try:
            with self._keys.once(identity_of(form)) as is_first:
                if is_first:
                    await self._approve(record, form)
        except _Refused as refused:
            answer = AnswerForm(refused.question, form, refused.errors)
            return self._renderer.page(
                "answer.html",
                422,
                here="runs",
                record=record,
                answer=answer,
                key=self._keys.form("approve", record.run_id),
                can_resume=can_resume(self._settings, record),
            )
        return to_run(record.run_id, is_started=self._is_to_resume(record, form))

    def _is_to_resume(self, record: RunRecord, form: dict[str, str]) -> bool:
        return form.get("resume") == "yes" and can_resume(self._settings, record)

    async def _approve(self, record: RunRecord, form: dict[str, str]) -> None:
        questions = await to_thread.run_sync(self._settings.store.waiting, record.run_id)
        question = self._find(questions, form)
        answer: Any
        if form.get("happened") == "no":
            answer = NotDone()
        elif form.get("by") == "fields":
            answer, errors = parse_fields(fields_of(question.answer_schema()), form)
            if errors:
                raise _Refused(question, errors)
        else:
            try:
                answer = json.loads(form.get("answer", ""))
            except (ValueError, RecursionError) as error:
                why = f"not JSON: {clean(str(error), 300)}; a text needs quotes"
                raise _Refused(question, [FieldError("", why)]) from error
        await self._signal(record, question, answer)
        resume = self._settings.served(record).resume
        if resume is not None and self._is_to_resume(record, form):
            await to_thread.run_sync(resume, record.run_id)

    def _find(self, questions: list[Waiting], form: dict[str, str]) -> Waiting:
        """Return the question of a form. Raises HTTPException if it is not open."""
        named = next((one for one in questions if one.id == form.get("question")), None)
        if named is None:
            raise HTTPException(409, "the question is not open any more; reload the page of the run")
        return named

    async def _signal(self, record: RunRecord, question: Waiting, answer: Any) -> None:
        """Store an answer. Raises _Refused if it does not fit, RequestRefused if the question is not open."""
        schema: type[BaseModel] | None = self._settings.find_schema(question) if question.schema_ref else None
        try:
            await self._actions.stored.answer(record.run_id, answer, question.id, schema)
        except ValidationError as error:
            errors = error.errors(include_url=False, include_context=False, include_input=False)
            raise _Refused(question, [_field_error(one) for one in errors[:_MAX_ERRORS]]) from error
        except (TypeError, ValueError, RecursionError) as error:
            raise _Refused(question, [FieldError("", clean(str(error), 1000))]) from error


def _field_error(error: Any) -> FieldError:
    """Return an error of pydantic: its field, and the message with the path inside of it."""
    name, inside = str(error["loc"][0]) if error["loc"] else "", ".".join(map(str, error["loc"][1:]))
    message = clean(error["msg"], 300)
    return FieldError(name, f"{inside}: {message}" if inside else message)
