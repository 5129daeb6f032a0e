"""Content and calls in a text, while it is written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal
from uuid import uuid4

from tokentree.serve.tools.formats import Format

GAP = r"\s{0,64}"  # more white space is in no call
OTHER = r'"(?!(?:name|arguments|parameters|type|id)")[^"]*"'  # a first key that is none of a call


@dataclass(frozen=True)
class CallPart:
    """A part of a call.

    Args:
        index: the number of the call in its text.
        id: of the first part alone, as is ``name``.
        arguments: the next piece of the JSON of its arguments.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


def joined(parts: Iterable[CallPart]) -> list[CallPart]:
    """The same parts, one for each call."""
    found = dict[int, CallPart]()
    for part in parts:
        first = found.get(part.index)
        found[part.index] = part if first is None else replace(first, arguments=first.arguments + part.arguments)
    return list(found.values())


class _Object:
    """Where the text of a JSON object is."""

    def __init__(self, depth: int = 0) -> None:
        self.depth, self._quoted, self._escaped = depth, False, False

    def end(self, text: str, start: int) -> int | None:
        """Reads ``text`` from ``start`` on. Returns the place behind the object, or of a "<" outside of its strings,
        where it is broken off; None if it goes on."""
        for place in range(start, len(text)):
            char = text[place]
            if self._quoted:
                self._quoted = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == "<":
                return place
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self.depth += 1
            elif char in "}]":
                self.depth -= 1
                if not self.depth:
                    return place + 1
        return None


class CallReader:
    """Splits a text into content and calls. What looks like a call of no known function stays content, and so does
    what isn't JSON. White space between calls is left out.

    A call counts as soon as its name and the beginning of its arguments are there. The arguments are those that the
    model wrote, whole or not.

    Args:
        form: how calls are written.
        names: the functions.
        hidden: special tokens among the tags of ``form``, which a text is shown without. They are fed as text.
        forced: whether the text is calls and nothing else. What is left of one that was cut off is then no content.
        reason: the finish reason of a text that calls.

    Attributes:
        calls: how many calls there are so far.
        content_first: whether there was content before them.
    """

    def __init__(
        self, form: Format, names: Iterable[str], hidden: Mapping[int, str], forced: bool = False,
        reason: Literal["stop", "tool_calls"] = "tool_calls",
    ) -> None:  # fmt: skip
        self._forced, self.reason = forced, reason
        self.hidden, self.calls, self.content_first = hidden, 0, False
        self._form, self._names = form, sorted(names)
        known = "|".join(map(re.escape, self._names))
        keys = f'{GAP}"(?:arguments|parameters)"{GAP}'
        long = r'[^"\\]{0,64}"|[^"\\]{65}'  # as names of functions aren't
        unknown = f'"name"{GAP}:{GAP}(?:[^"\\s]|"(?!(?:{known})")(?:{long}))'
        # with tags JSON is no answer, so a name is no reason to stop waiting for the end
        self._other = re.compile(rf"\{{{GAP}(?:{OTHER}{f'|{unknown}' if form.bare else ''})")
        self._header = re.compile(rf'\{{{GAP}"name"{GAP}:{GAP}"({known})"{GAP},{keys}:{GAP}(?=\{{)')
        self._step = self._text
        self._held = ""  # text that isn't told yet
        self._blank: str | None = ""  # white space since the last call; None behind content
        self._bare = form.bare  # whether a call may begin here without a tag
        self._tag = ""  # what stood before the JSON that is held
        self._object = _Object()
        self._seen = 0  # characters of what is held that ``_object`` has read
        self._parts = list[str | CallPart]()

    def feed(self, text: str, last: bool = False) -> list[str | CallPart]:
        """Takes in more ``text``; returns the content and the calls in it. With the ``last`` one, all that is left."""
        self._held += text
        while self._step(last):
            pass
        if last and self._blank and not self.calls and not self._forced:
            self._parts.append(self._blank)
            self._blank = None
        parts, self._parts = self._parts, []
        return parts

    # Each step looks at what is held, and returns whether another one comes next.

    def _text(self, last: bool) -> bool:
        begin = self._form.begin
        if self._bare:
            rest = self._held.lstrip(" \n\t\r;" if self.calls else None)
            if not rest and not last:
                return False
            self._bare = False
            if rest.startswith("{"):
                return self._open(self._held[: len(self._held) - len(rest)], rest)
        before, tag, rest = self._held.partition(begin)
        if tag:
            self._say(before)
            return self._open(tag, rest)
        kept = 0 if last else next((n for n in range(len(begin) - 1, 0, -1) if before.endswith(begin[:n])), 0)
        self._say(before[: len(before) - kept])
        self._held = before[len(before) - kept :]
        return False

    def _open(self, tag: str, rest: str) -> bool:
        self._tag, self._held, self._object, self._seen = tag, rest, _Object(), 0
        self._step = self._candidate
        return True

    def _candidate(self, last: bool) -> bool:
        """Behind a tag, before it is certain that a call begins."""
        json_text = self._held.lstrip()
        self._tag, self._held = self._tag + self._held[: len(self._held) - len(json_text)], json_text
        if not json_text and not last:
            return False
        if not json_text.startswith("{") or self._other.match(json_text):
            return self._no_call(0)
        if header := self._header.match(json_text):
            self._begin(header[1])
            self._held, self._object, self._step = json_text[header.end() :], _Object(), self._arguments
            return True
        end = self._object.end(json_text, self._seen)
        self._seen = len(json_text)
        if end is None:
            return self._no_call(len(json_text)) if last else False
        call = self._whole_call(json_text[:end])
        if call is None:
            return self._no_call(end)
        self._begin(call[0])
        self._argue(call[1])
        self._held, self._step = json_text[end:], self._end
        return True

    def _whole_call(self, text: str) -> tuple[str, str] | None:
        """The name and the arguments of a call whose keys are in another order."""
        try:
            found: Any = json.loads(text)
        except (ValueError, RecursionError):
            return None
        arguments = found.get("arguments", found.get("parameters"))
        if found.get("name") not in self._names or not isinstance(arguments, dict):
            return None
        return found["name"], json.dumps(arguments, ensure_ascii=False)

    def _arguments(self, last: bool) -> bool:
        end = self._object.end(self._held, 0)
        self._argue(self._held[:end])
        if end is None:
            self._held = ""
            return False
        broken = self._held[end : end + 1] == "<"
        self._held, self._object = self._held[end:], _Object(1)
        self._step = self._end if broken else self._behind
        return True

    def _behind(self, last: bool) -> bool:
        """Behind the arguments, in the object that holds them."""
        end = self._object.end(self._held, 0)
        self._held = "" if end is None else self._held[end:]
        if end is not None:
            self._step = self._end
        return end is not None

    def _end(self, last: bool) -> bool:
        end, rest = self._form.end, self._held.lstrip()
        if end and end.startswith(rest[: len(end)]) and len(rest) < len(end) and not last:
            return False
        self._held = rest[len(end) :] if end and rest.startswith(end) else self._held
        self._step, self._bare = self._text, self._form.bare
        return True

    # -- what is told --------------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        for tag in self.hidden.values():
            text = text.replace(tag, "")
        if self._blank is not None:
            self._blank += text
            if not self._blank.strip():
                return
            text, self._blank = self._blank, None
        if text and not self._forced:
            self._parts.append(text)
            self.content_first |= not self.calls

    def _no_call(self, size: int) -> bool:
        """What is held is content: its tag, and so many characters."""
        self._say(self._tag + self._held[:size])
        self._held, self._step = self._held[size:], self._text
        return True

    def _begin(self, name: str) -> None:
        self._parts.append(CallPart(self.calls, f"call_{uuid4().hex[:24]}", name, ""))
        self.calls, self._blank = self.calls + 1, ""

    def _argue(self, text: str) -> None:
        if text:
            self._parts.append(CallPart(self.calls - 1, None, None, text))
