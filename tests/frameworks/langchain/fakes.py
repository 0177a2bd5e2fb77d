"""A chat model that answers what it is told to, and says what it used, streamed or not."""

from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import PrivateAttr


class Script(BaseChatModel):
    """Answers: a text, or (tool name, arguments); what is an exception, it raises."""

    answers: list[Any]
    tokens: int = 10
    break_after: int | None = None
    _asked: list[Any] = PrivateAttr(default_factory=list)

    @property
    def asked(self) -> list[Any]:
        return self._asked

    @property
    def _llm_type(self) -> str:
        return "script"

    def bind_tools(self, tools: Any, **_: Any) -> Any:
        return self

    def _next(self, messages: Any) -> AIMessage:
        self._asked.append(list(messages))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        calls = []
        if isinstance(answer, tuple):
            calls = [
                {"name": answer[0], "args": answer[1], "id": f"call{len(self._asked)}", "type": "tool_call"}
            ]
        return AIMessage(
            "" if calls else answer,
            tool_calls=calls,
            usage_metadata={"input_tokens": self.tokens - 1, "output_tokens": 1, "total_tokens": self.tokens},
            response_metadata={"model_name": "gpt-4o"},
        )

    def _generate(self, messages: Any, *_: Any, **__: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self._next(messages))])

    def _stream(self, messages: Any, *_: Any, run_manager: Any = None, **__: Any) -> Any:
        message = self._next(messages)
        for n, word in enumerate(str(message.content).split()):
            if n == self.break_after:
                raise TimeoutError("lost")
            yield ChatGenerationChunk(message=AIMessageChunk(word + " "))
        yield ChatGenerationChunk(
            message=AIMessageChunk(
                "",
                tool_calls=message.tool_calls,
                usage_metadata=message.usage_metadata,
                response_metadata=message.response_metadata,
            )
        )
