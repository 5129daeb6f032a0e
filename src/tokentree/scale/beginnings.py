"""Which replica a request goes to: where its beginning is known, unless that one is the busier one."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

BLOCK = 256  # characters: a long message has a mark after each so many
IDS = 32  # the same of a prompt in token ids
MARKS = 1024  # of a request; what lies behind them doesn't say where it goes
KNOWN = 1 << 16  # marks that are remembered
PLACES = 4  # replicas that are remembered of a mark, the latest ones
SLACK = 2  # requests that a replica may have more than the least busy one

Marks = tuple[bytes, ...]


def marks_of(body: bytes) -> Marks:
    """Digests of the beginnings of a request's prompt, the shortest first: one behind each message, and behind each
    block of a long one. Requests that begin alike have their first marks in common. None of a body that has no prompt.
    """
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):  # the replica tells what is wrong
        return ()
    found, digest = list[bytes](), b""
    for piece in _pieces(asked) if isinstance(asked, dict) else ():
        for start in range(0, len(piece), BLOCK):
            if len(found) == MARKS:
                return tuple(found)
            digest = hashlib.blake2b(
                digest + piece[start : start + BLOCK].encode(errors="replace"), digest_size=8
            ).digest()
            found.append(digest)
    return tuple(found)


def _pieces(asked: dict[str, Any]) -> Iterator[str]:
    if asked.get("tools"):
        yield json.dumps(asked["tools"])
    if asked.get("instructions"):
        yield f"system\n{asked['instructions']}"
    for name in ("messages", "input", "prompt"):
        given = asked.get(name)
        if isinstance(given, str):
            yield given if name == "prompt" else f"user\n{given}"
        elif isinstance(given, list):
            yield from _of_list(given)


def _of_list(given: list[Any]) -> Iterator[str]:
    if given and isinstance(given[0], int):
        for start in range(0, len(given), IDS):
            yield json.dumps(given[start : start + IDS])
        return
    for one in given[:MARKS]:
        if isinstance(one, dict):
            content = one.get("content")
            more = {name: value for name, value in one.items() if name not in ("role", "content")}
            text = content if isinstance(content, str) else json.dumps(content)
            yield f"{one.get('role')}\n{text}" + (json.dumps(more) if more else "")
        else:
            yield json.dumps(one)


class Beginnings:
    """Which replicas have read which beginnings lately.

    Args:
        most: marks that are remembered; the one that wasn't asked for longest makes room.
    """

    def __init__(self, most: int = KNOWN) -> None:
        self._most = most
        self._places = OrderedDict[bytes, list[str]]()

    def __len__(self) -> int:
        return len(self._places)

    def learn(self, marks: Marks, replica: str) -> None:
        """From now on ``replica`` knows these."""
        for mark in marks:
            places = self._places.setdefault(mark, [])
            if replica in places:
                places.remove(replica)
            places.insert(0, replica)
            del places[PLACES:]
            self._places.move_to_end(mark)
        while len(self._places) > self._most:
            self._places.popitem(last=False)

    def forget(self, replica: str) -> None:
        """It has ended."""
        for mark in list(self._places):
            places = self._places[mark]
            if replica in places:
                places.remove(replica)
            if not places:
                del self._places[mark]

    def known(self, marks: Marks) -> dict[str, int]:
        """By replica, how many of the first marks it knows."""
        found = dict[str, int]()
        for count in range(len(marks), 0, -1):
            for replica in self._places.get(marks[count - 1], ()):
                found.setdefault(replica, count)
        return found


def ranked(ongoing: Mapping[str, int], known: Mapping[str, int], marks: Marks, slack: int = SLACK) -> list[str]:
    """Replicas, the best one first. Those that have ``slack`` requests more than the least busy one come last, the less
    busy ones first. Of the others the one that knows most is first, then the less busy one. What is left is decided by
    a digest of the first mark and the replica, so that several routers decide alike.

    Args:
        ongoing: how many requests each replica has.
        known: what `Beginnings.known` found.
    """
    limit = min(ongoing.values(), default=0) + slack
    first = marks[0] if marks else b""

    def order(replica: str) -> tuple[bool, int, int, bytes]:
        busy = ongoing[replica] > limit
        tie = hashlib.blake2b(first + replica.encode(), digest_size=8).digest()
        return busy, 0 if busy else -known.get(replica, 0), ongoing[replica], tie

    return sorted(ongoing, key=order)
