"""The answer to a request to /v1/responses, at once or as events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from tokentree.serve.errors import api_error
from tokentree.serve.figures import speculative, usage
from tokentree.serve.responses.protocol import FlatNamedTool, ResponsesRequest
from tokentree.serve.service import Service
from tokentree.serve.tools.reader import CallPart, joined
from tokentree.serve.writing import Job, Update

Event = dict[str, Any]


class Response:
    """What a request is told."""

    last = ""  # no word of its own ends the stream

    def __init__(self, service: Service, asked: ResponsesRequest, job: Job) -> None:
        self._asked, self._job, self._model = asked, job, service.settings.model_name
        self._id, self._created = f"resp_{uuid4().hex}", int(time.time())

    def whole(self, updates: list[Update]) -> dict[str, Any]:
        """The answer at once."""
        (update,) = updates
        items, reader = _Items(), update.choice.reader
        if update.text and (reader is None or reader.content_first):
            [*items.say(update.text)]
        [*items.call(joined(update.calls))]
        if update.text and reader is not None and not reader.content_first:
            [*items.say(update.text)]
        status = _status(update)
        [*items.end(status)]
        return self._response(status, items.told)

    async def chunks(self) -> AsyncGenerator[Event]:
        """The answer as events, numbered."""
        number = 0
        async with aclosing(self._events()) as events:
            async for event in events:
                yield event | {"sequence_number": number}
                number += 1

    async def _events(self) -> AsyncGenerator[Event]:
        items, status = _Items(), "completed"
        for name in ("created", "in_progress"):
            yield {"type": f"response.{name}", "response": self._response("in_progress", [])}
        try:
            async with aclosing(self._job.updates()) as updates:
                async for update in updates:
                    for event in items.take(update):
                        yield event
                    if update.finish_reason is not None:
                        status = _status(update)
        except Exception as error:  # noqa: BLE001  the status has gone out already
            told = api_error(error)
            yield {"type": "error", "code": told.code, "message": told.message, "param": told.param}
            return
        for event in items.end(status):
            yield event
        yield {"type": f"response.{status}", "response": self._response(status, items.told)}

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        asked, params = self._asked, self._job.choices[0].seq.params
        form = asked.text.format if asked.text is not None else None
        choice = asked.tool_choice
        over = status != "in_progress"
        return {
            "id": self._id, "object": "response", "created_at": self._created, "status": status, "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions, "max_output_tokens": asked.max_output_tokens, "model": self._model,
            "output": output, "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "temperature": params.temperature, "top_p": params.top_p,
            "tool_choice": choice.model_dump() if isinstance(choice, FlatNamedTool) else choice or "auto",
            "tools": [tool.model_dump() for tool in asked.tools or []],
            "text": {"format": form.model_dump(by_alias=True, exclude_unset=True) if form else {"type": "text"}},
            "metadata": asked.metadata or {}, "store": False, "previous_response_id": None, "background": False,
            "truncation": "disabled", "user": asked.user, "usage": self._usage() if over else None,
            "metrics": {"speculative_decoding": speculative(self._job.choices)} if over else None,
        }  # fmt: skip

    def _usage(self) -> dict[str, Any]:
        known = usage(self._job.choices)
        return {
            "input_tokens": known["prompt_tokens"], "input_tokens_details": known["prompt_tokens_details"],
            "output_tokens": known["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": known["total_tokens"],
        }  # fmt: skip


def _status(update: Update) -> str:
    return "incomplete" if update.finish_reason == "length" else "completed"


class _Items:
    """What an answer holds, in the order in which it began: a message, and calls.

    Attributes:
        told: the items.
    """

    def __init__(self) -> None:
        self.told = list[dict[str, Any]]()
        self._message: int | None = None
        self._call: int | None = None  # the last one, if it goes on

    def take(self, update: Update) -> Iterator[Event]:
        """The events of what steps added."""
        if update.text and (self._message is not None or not update.calls or update.calls[0].index == 0):
            yield from self.say(update.text)
            yield from self.call(update.calls)
        else:
            yield from self.call(update.calls)
            yield from self.say(update.text)

    def say(self, text: str) -> Iterator[Event]:
        """The events of more content."""
        if not text:
            return
        if self._message is None:
            yield from self._open_message()
        assert self._message is not None
        part = self.told[self._message]["content"][0]
        part["text"] += text
        yield self._event("output_text.delta", self._message, content_index=0, delta=text, logprobs=[])

    def call(self, parts: list[CallPart]) -> Iterator[Event]:
        """The events of more parts of calls."""
        for part in parts:
            if part.id is not None:
                yield from self._close_call("completed")
                item = {
                    "type": "function_call", "id": f"fc_{uuid4().hex}", "call_id": part.id, "name": part.name,
                    "arguments": "", "status": "in_progress",
                }  # fmt: skip
                self._call = len(self.told)
                yield self._added(item)
            assert self._call is not None
            if part.arguments:
                self.told[self._call]["arguments"] += part.arguments
                yield self._event("function_call_arguments.delta", self._call, delta=part.arguments)

    def end(self, status: str) -> Iterator[Event]:
        """The last events."""
        if not self.told:
            yield from self._open_message()
        if self._message is not None:
            item, place = self.told[self._message], self._message
            item["status"], (part,) = status, item["content"]
            yield self._event("output_text.done", place, content_index=0, text=part["text"], logprobs=[])
            yield self._event("content_part.done", place, content_index=0, part=part)
            yield {"type": "response.output_item.done", "output_index": place, "item": item}
        yield from self._close_call(status)

    def _open_message(self) -> Iterator[Event]:
        item = {"type": "message", "id": f"msg_{uuid4().hex}", "role": "assistant", "status": "in_progress"}
        self._message = len(self.told)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield self._added(item | {"content": []})
        self.told[self._message]["content"] = [part]
        yield self._event("content_part.added", self._message, content_index=0, part=dict(part))

    def _close_call(self, status: str) -> Iterator[Event]:
        if self._call is None:
            return
        item, place = self.told[self._call], self._call
        item["status"], self._call = status, None
        yield self._event(
            "function_call_arguments.done", place, name=item["name"], arguments=item["arguments"]
        )  # fmt: skip
        yield {"type": "response.output_item.done", "output_index": place, "item": item}

    def _added(self, item: dict[str, Any]) -> Event:
        self.told.append(item)
        return {"type": "response.output_item.added", "output_index": len(self.told) - 1, "item": dict(item)}

    def _event(self, name: str, place: int, /, **more: Any) -> Event:
        return {"type": f"response.{name}", "item_id": self.told[place]["id"], "output_index": place} | more
