"""What a model is asked for when it writes texts to train on: the kinds of requests, and how often each comes.

What a request is about (to be summarized, translated, searched, explained) is first written by the model, most often.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tokentree.train.seeds import (
    EXAMPLES,
    FUNCTIONS,
    LANGUAGES,
    NAMES,
    PEOPLE,
    PLACES,
    PROGRAMS,
    PUZZLES,
    SENTENCES,
    SUMS,
    THINGS,
    TOPICS,
)

TEXT = "{text}"  # in a request: what the model wrote before
SHORT, MIDDLE, LONG = 48, 96, 384  # tokens of what a request is about, at most


@dataclass(frozen=True)
class Chat:
    """A chat that is to be.

    Args:
        kind: what it is counted as.
        turns: what the user says, one after another, with `TEXT` for the answer of the first of the chats that belong
            together. None is what the model thinks that a user says.
        tokens: of an answer, at most; 0: as many as any.
        bare: what is said is no chat, but the beginning of a text that goes on.
    """

    kind: str
    turns: tuple[str | None, ...]
    tokens: int = 0
    bare: bool = False


Chats = list[Chat]


def plan(number: int, seed: int) -> Chats:
    """What the texts with this number are to be."""
    return MAKERS[ORDER[number % len(ORDER)]](Random(f"{seed} {number}"))


def _chat(draw: Random) -> Chats:
    return [Chat("chat", (None,) * draw.choice((1, 2, 2, 3)))]


def _question(draw: Random) -> Chats:
    topic, place, person = draw.choice(TOPICS), draw.choice(PLACES), draw.choice(PEOPLE)
    asks = (
        f"What is the most important fact about {topic}?",
        f"Explain {topic} in simple words.",
        f"who invented or discovered {topic}",
        f"When did people first hear of {topic}, and where?",
        f"What should somebody in {place} know about {topic}?",
        f"How would {person} explain {topic}?",
        f"Why does {topic} matter?",
        f"what is {place} famous for",
        f"What is the difference between {topic} and {draw.choice(TOPICS)}?",
        f"Tell me something about {topic} that few people know.",
    )
    firsts = (
        f"Write one short question about {topic}, and nothing else.",
        f"Which question about {topic} do people ask most often? Write the question only.",
        f"Write a quiz question about {topic} that has a short answer. Don't tell the answer.",
    )
    if draw.random() < 0.5:
        return [Chat("question", (draw.choice(asks),))]
    return [Chat("question", (draw.choice(firsts),), SHORT), Chat("question", (TEXT,))]


def _article(draw: Random) -> Chats:
    """A long text, and what may be asked about it."""
    topic, place, name, count = draw.choice(TOPICS), draw.choice(PLACES), draw.choice(NAMES), draw.choice((2, 3, 4))
    firsts = (
        f"Write a news report about {topic} in {place}, with names, dates and numbers.",
        f"Write an encyclopedia article about {topic}.",
        f"Write three paragraphs about {topic} for a school book.",
        f"Write a newspaper article about {name} from {place}, who knows all about {topic}.",
        f"Write a magazine article on {topic}: its past, its present and its future.",
        f"Write a blog post about {topic} and what it means for people in {place}.",
        f"Write a report of a town meeting in {place} about {topic}. Say who spoke and what was decided.",
        f"Write {count} short passages about {topic}, as from {count} books. Write Passage 1, Passage 2 and so on.",
        f"Write what an encyclopedia says about {topic}: its history, its use, and people who are known for it.",
    )
    tasks = [_summary(draw), _retrieval(draw, topic), _extraction(draw)]
    return [Chat("writing", (draw.choice(firsts),), LONG), *tasks[: draw.choice((2, 2, 3))]]


def _summary(draw: Random) -> Chat:
    asks = (
        "Summarize this text.\n\n{text}",
        "Summarize the following article in three sentences:\n\n{text}",
        "{text}\n\nSum up the text above in a few words.",
        "Give me the main points of this article as a list.\n\n{text}",
        "What is this text about? Answer briefly.\n\n{text}",
        "Write a short abstract.\n\n{text}",
        "Article: {text}\n\nSummary:",
        "Shorten this text to half of its length:\n{text}",
        "I have no time to read all of this. What does it say?\n\n{text}",
    )
    more = ("Now say it in one sentence.",) if draw.random() < 0.15 else ()
    return Chat("summary", (draw.choice(asks), *more))


def _retrieval(draw: Random, topic: str) -> Chat:
    asked = draw.choice((
        f"what is said about {topic}?", "who is mentioned, and why?", "which dates or numbers are given?",
        "what happened first?", "why does it matter?", "what are the causes?", "which problem is described?",
        "where does this take place?", "what do we learn about the future?",
    ))  # fmt: skip
    asks = (
        "Read the passages and answer the question.\n\n{text}\n\nQuestion: " + asked,
        "Answer with the help of this text only.\n\nText: {text}\n\nQuestion: " + asked + "\nAnswer:",
        "Here is what a search has found:\n\n{text}\n\nBy this, " + asked,
        "Context:\n{text}\n\n" + asked.capitalize() + " If the context doesn't tell, say so.",
        "{text}\n\nAccording to the text above, " + asked,
    )
    return Chat("retrieval", (draw.choice(asks),))


def _extraction(draw: Random) -> Chat:
    asks = (
        "Which names, places and numbers are in this text? Answer as JSON.\n\n{text}",
        "List all people in the text, and what they do.\n\n{text}",
        "{text}\n\nExtract all dates and numbers.",
        "Find five key words of this text.\n\n{text}",
        "Is this text positive, negative or neutral? Say why.\n\n{text}",
        "Make a table of who did what in this text.\n\n{text}",
        "Copy the first sentence of this text.\n\n{text}",
        "Correct the spelling and grammar of this text.\n\n{text}",
        "Rewrite this text for a child.\n\n{text}",
    )
    return Chat("extraction", (draw.choice(asks),))


def _translation(draw: Random) -> Chats:
    other = draw.choice([language for language in SENTENCES if language != "English"])
    source, goal = (other, "English") if draw.random() < 0.7 else ("English", other)
    asks = (
        f"Translate this from {source} into {goal}: {{text}}",
        f"What does this mean in {goal}?\n\n{{text}}",
        f"Translate into {goal}.\n\n{{text}}",
        f"{source}: {{text}}\n{goal}:",
        f'Please put this into {goal}: "{{text}}"',
        f"I got this message in {source}. Translate it for me into {goal}.\n{{text}}",
    )
    ask = draw.choice(asks)
    if draw.random() < 0.6:
        return [Chat("translation", (ask.replace(TEXT, _sentences(draw, source)),))]
    first = f"Write {draw.choice(('a sentence', 'two sentences'))} in {source} about {draw.choice(TOPICS)}."
    return [Chat("translation", (first,), MIDDLE), Chat("translation", (ask,))]


def _sentences(draw: Random, language: str) -> str:
    """Up to four sentences."""
    subjects, deeds, clauses = SENTENCES[language]
    made = [
        f"{draw.choice(subjects)} {draw.choice(deeds)}" + (f", {draw.choice(clauses)}." if draw.random() < 0.7 else ".")
        for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 4)))
    ]
    return " ".join(made)


def _completion(draw: Random) -> Chats:
    signature, told = draw.choice(FUNCTIONS)
    name, quotes = signature.partition("(")[0], draw.choice(('"""', '"""', "'''"))
    if draw.random() < 0.3:
        for type_ in (": str", ": int", ": float", " -> str", " -> int", " -> bool"):
            signature = signature.replace(type_, "")
    shown = [f"    >>> {name}({given})\n    {result}\n" for given, result in EXAMPLES.get(name, ())]
    told = draw.choice(("", " ")) + told + ("\n" + "".join(shown) + "    " if shown else draw.choice(("", "\n    ")))
    head = f"def {signature}:\n    {quotes}{told}{quotes}\n"
    before = ("", "", "from typing import List\n\n\n", "import math\n\n\n", "from __future__ import annotations\n\n\n")
    if draw.random() < 0.6:
        return [Chat("completion", (draw.choice(before) + head,), bare=True)]
    asks = (
        "Complete this function.\n\n```python\n{code}```",
        "{code}",
        "Finish the code:\n\n{code}",
        "Write the body of this Python function, and nothing else.\n\n{code}",
        "```python\n{code}```",
        "Fill in the missing part.\n```python\nfrom __future__ import annotations\n\n\n{code}```",
    )
    return [Chat("completion", (draw.choice(asks).replace("{code}", head),))]


def _code(draw: Random) -> Chats:
    language, (_, told) = draw.choice(LANGUAGES), draw.choice(FUNCTIONS)
    program = f"a {language} program that {draw.choice(PROGRAMS)}."
    what = f"a {language} function. {told}" if draw.random() < 0.5 else program
    asks = (
        f"Write {what}",
        f"Show me {what}",
        f"I need {what}",
        f"Write {what} Explain it.",
        f"Write {what} Be brief.",
    )
    later = (
        "Explain this code line by line.", "Now add comments to it.", "Write tests for it.", "Can it be made faster?",
        "What happens with an empty input?", "Translate it into another programming language.",
    )  # fmt: skip
    tasks = (
        "Explain what this code does.\n\n{text}",
        "Find the mistakes in this code, and correct them.\n\n{text}",
        "Rewrite this code so that it is easier to read:\n\n{text}",
        "Add type hints and docstrings.\n\n{text}",
        "Write unit tests for this.\n\n{text}",
        "{text}\n\nHow fast is this code for large inputs?",
    )
    way, ask = draw.random(), draw.choice(asks)
    if way < 0.5:
        return [Chat("code", (ask, draw.choice(later)) if way < 0.2 else (ask,))]
    return [Chat("code", (ask,)), Chat("code", (draw.choice(tasks),))]


def _filled(draw: Random, frame: str) -> str:
    """``frame`` with names, numbers and topics."""
    name, other, third = draw.sample(NAMES, 3)
    thing, second, more = draw.sample(THINGS, 3)
    topic, next_topic = draw.sample(TOPICS, 2)
    return frame.format(
        name=name, other=other, third=third, thing=thing, second=second, more=more, topic=topic, next=next_topic,
        place=draw.choice(PLACES), a=draw.randint(20, 250), b=draw.randint(10, 90), c=draw.randint(2, 9),
    )  # fmt: skip


def _maths(draw: Random) -> Chats:
    if draw.random() < 0.3:
        about = f"{draw.choice(THINGS)} in {draw.choice(PLACES)}"
        first = f"Write a word problem about {about} with three numbers. Don't solve it."
        return [Chat("maths", (first,), MIDDLE), Chat("maths", (TEXT,))]
    end = draw.choice(("", "", " Think step by step.", " Explain your answer.", "\nAnswer with a number."))
    return [Chat("maths", (_filled(draw, draw.choice(SUMS)) + end,))]


def _reasoning(draw: Random) -> Chats:
    more = ("Are you sure? Explain it again.",) if draw.random() < 0.3 else ()
    return [Chat("reasoning", (_filled(draw, draw.choice(PUZZLES)), *more))]


def _writing(draw: Random) -> Chats:
    topic, place, name, person = draw.choice(TOPICS), draw.choice(PLACES), draw.choice(NAMES), draw.choice(PEOPLE)
    asks = (
        f"Write a short story about {person} who learns about {topic}.",
        f"Write a poem about {topic}.",
        f"Write an email to {name} about a meeting on {topic} in {place}.",
        f"Write a speech for {name}, {person}.",
        f"Write a product description for something that has to do with {topic}.",
        f"Write a letter of complaint about {topic}.",
        f"Describe a day in {place}.",
        f"Write a dialogue between {name} and {person} about {topic}.",
        f"Write an essay for and against {topic}.",
        f"Write an invitation to a party in {place}.",
        f"Suggest a headline and a first paragraph for an article about {topic}.",
    )
    later = (
        "Make it shorter.", "Rewrite it in a friendlier tone.", "Now write it for children.", "Turn it into a list.",
        "Give it a surprising end.", "Rewrite it in the past tense.", "Which part of it is the best, and why?",
    )  # fmt: skip
    return [Chat("writing", (draw.choice(asks), *draw.sample(later, draw.choice((0, 1, 1, 2)))))]


def _roleplay(draw: Random) -> Chats:
    person, topic, place = draw.choice(PEOPLE), draw.choice(TOPICS), draw.choice(PLACES)
    asks = (
        f"You are {person}. Introduce yourself.",
        f"Pretend to be {person}. I ask you: what do you think of {topic}?",
        f"Let's play: you are {person} in {place}, and I am a visitor. You begin.",
        f"Answer as {person} would. What was your hardest day?",
        f"Imagine that you are {person}. Give me advice on {topic}.",
    )
    later = (f"What do you say about {topic}?", "What happens next?", f"Have you been to {place}?", "Tell me more.")
    return [Chat("roleplay", (draw.choice(asks), *draw.sample(later, draw.choice((0, 1, 1, 2)))))]


def _list(draw: Random) -> Chats:
    topic, place, count = draw.choice(TOPICS), draw.choice(PLACES), draw.choice((3, 5, 5, 7, 10))
    asks = (
        f"List {count} facts about {topic}.",
        f"Name {count} things to do in {place}.",
        f"Give me {count} tips on {topic}.",
        f"Make a table with {count} rows about {topic}.",
        f"What are the {count} most important steps in {topic}?",
        f"Suggest {count} titles for a book about {topic}.",
        f"Write a recipe with {count} ingredients.",
        f"Make a plan for {count} days in {place}.",
        f"Compare {topic} and {draw.choice(TOPICS)} in a table.",
    )
    return [Chat("list", (draw.choice(asks),))]


def _continuation(draw: Random) -> Chats:
    topic, place, name, person = draw.choice(TOPICS), draw.choice(PLACES), draw.choice(NAMES), draw.choice(PEOPLE)
    begun = (
        f"The history of {topic} begins",
        f"{place}, Monday. ",
        f"# {topic.capitalize()}\n\n",
        f"{name} had always wanted to know more about {topic}. One morning,",
        f"Dear {name},\n\nthank you for your letter about {topic}.",
        f"Question: What is known about {topic}?\nAnswer:",
        _sentences(draw, "English"),
        f"Once there was {person} who lived in {place}.",
    )
    return [Chat("continuation", (draw.choice(begun),), bare=True)]


MAKERS: dict[str, Callable[[Random], Chats]] = {
    "chat": _chat, "question": _question, "article": _article, "translation": _translation, "completion": _completion,
    "code": _code, "maths": _maths, "reasoning": _reasoning, "writing": _writing, "roleplay": _roleplay, "list": _list,
    "continuation": _continuation,
}  # fmt: skip
# how often each comes among as many numbers as these are together
SHARES = {
    "chat": 4, "question": 5, "article": 10, "translation": 8, "completion": 8, "code": 4, "maths": 6, "reasoning": 2,
    "writing": 2, "roleplay": 2, "list": 2, "continuation": 2,
}  # fmt: skip


def _order() -> tuple[str, ...]:
    """What numbers that follow one another are, again and again."""
    order = [name for name, share in SHARES.items() for _ in range(share)]
    Random(0).shuffle(order)
    return tuple(order)


ORDER = _order()
