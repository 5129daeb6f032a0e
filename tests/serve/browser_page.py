"""The page at / in a browser: it chats, shows trees, compares, and stays on its host.

Run by `make browser`, which installs playwright beside the environment. The browser is Debian's Chromium, or the one
that CHROMIUM names.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Request, Route, expect, sync_playwright

from tests.serve.serving import Served, serving, slowed, tiny_llm
from tokentree import LLM, SamplingParams

ARGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
EXPECTED = re.compile(r"status of (400|401|503)|net::ERR_FAILED")  # which the browser tells of each such answer
PROMPT = "one two three one two"
REPEATED = dict.fromkeys((81, 270, 259), 100.0)  # so that drafts are often right
Open = Callable[..., Page]


@contextmanager
def apart(llm: LLM | None, **settings: Any) -> Iterator[Served]:
    """`serving`, begun and ended by another thread: this one has playwright's loop."""
    context = serving(llm, **settings)
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(context.__enter__).result()
        pool.submit(context.__exit__, None, None, None).result()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        path = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        with playwright.chromium.launch(executable_path=path, args=list(ARGS)) as browser:
            yield browser


@pytest.fixture(scope="module")
def running() -> Iterator[Served]:
    with apart(tiny_llm(), defaults={"logit_bias": REPEATED}) as served:
        yield served


@pytest.fixture
def opened(browser: Browser, running: Served) -> Iterator[Open]:
    """Opens the page. At the end nothing may have been asked of other hosts, and nothing complained about."""
    asked, complaints = list[str](), list[str]()

    def opened(url: str = running.url, **options: Any) -> Page:
        page = browser.new_page(**options)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        return page

    yield opened
    for context in browser.contexts:
        context.close()
    assert asked
    assert {url.split("/")[2].partition(":")[0] for url in asked} == {"127.0.0.1"}
    assert [one for one in complaints if not EXPECTED.search(one)] == []


def send(page: Page, text: str = PROMPT) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def ended(page: Page) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=60_000)


def setting(page: Page, **fields: str) -> None:
    page.get_by_role("button", name="Settings").click()
    for name, value in fields.items():
        page.locator(f"#settings [name={name}]").fill(value)
    page.get_by_role("button", name="Done").click()


def text_of(page: Page, number: int = 0) -> str:
    return page.locator(".text").nth(number).text_content() or ""


def expected(served: Served, messages: list[dict[str, str]], **options: Any) -> str:
    return served.llm.chat(messages, SamplingParams(logit_bias=REPEATED, **options)).text


def sent(request: Request) -> dict[str, Any]:
    """The body of a request."""
    body: dict[str, Any] = json.loads(request.post_data or "")
    return body


def fake(page: Page, answers: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each request gets the next one of ``answers``, a list of choices. Returns the requests' bodies, as they come."""
    bodies = list[dict[str, Any]]()

    def fulfil(route: Route) -> None:
        bodies.append(sent(route.request))
        events = [{"choices": [choice]} for choice in answers[len(bodies) - 1]]
        said = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        route.fulfill(content_type="text/event-stream", body=f"{said}data: [DONE]\n\n")

    page.route("**/v1/chat/completions", fulfil)
    return bodies


def part(text: str, ids: list[int], trees: list[Any]) -> dict[str, Any]:
    return {"delta": {"content": text}, "token_ids": ids, "trees": trees}


def node(token: int, text: str, parent: int, drafters: list[str], accepted: bool) -> dict[str, Any]:
    return {
        "token": token, "text": text, "parent": parent, "drafters": drafters, "accepted": accepted, "log_prob": -0.5,
    }  # fmt: skip


def one_step(first: str, last: str) -> list[dict[str, Any]]:
    """An answer of one step: an accepted token, one that isn't, and the model's own."""
    nodes = [
        node(1, "?", -1, [], True), node(2, "no", 0, ["suffix"], False), node(3, first, 0, ["suffix", "eagle"], True),
    ]  # fmt: skip
    return [part(first + last, [3, 4], [{"nodes": nodes, "bonus": {"token": 4, "text": last}}])]


# -- a chat --------------------------------------------------------------------------------------------------------


def test_an_answer_is_the_model_s_and_its_tokens_are_told(opened: Open, running: Served) -> None:
    page = opened()
    setting(page, max_tokens="60")
    send(page)
    ended(page)
    said = expected(running, [{"role": "user", "content": PROMPT}], temperature=0, max_tokens=60)
    assert text_of(page) == said
    steps, tokens = int(page.locator("#forwards").inner_text()), int(page.locator("#count").inner_text())
    assert 1 < steps < tokens <= 60
    assert page.locator("#length").inner_text() == f"{tokens / steps:.2f}"
    assert float(page.locator("#speed").inner_text()) > 0
    legend = " ".join(page.locator("#legend li").all_inner_texts())
    assert "suffix" in legend
    # each step adds one token of the model's own, but the last one where the text ends amid a path
    own = int(re.findall(r"the model itself (\d+)", legend)[0])
    assert steps - 1 <= own <= steps
    assert page.locator(".text .word:not([data-steps])").count() == 0  # of each word the tokens were found
    painted = page.locator(".text .word[title]")
    assert painted.count() > 0
    assert "gradient" in painted.first.evaluate("word => getComputedStyle(word).backgroundImage")
    plain = page.locator(".text .word:not([title])").first
    assert plain.evaluate("word => getComputedStyle(word).backgroundImage") == "none"


def test_several_turns_and_a_system_prompt(opened: Open, running: Served) -> None:
    page = opened()
    setting(page, max_tokens="12", system="one", temperature="1.5", seed="7")
    messages = [{"role": "system", "content": "one"}]
    for number, text in enumerate(("two", "three")):
        send(page, text)
        ended(page)
        messages.append({"role": "user", "content": text})
        answer = expected(running, messages, temperature=1.5, seed=7, max_tokens=12)
        assert text_of(page, number) == answer
        messages.append({"role": "assistant", "content": answer})
    assert "seed\xa07" in (page.locator(".figures").first.text_content() or "")
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".turn").count() == 0
    send(page, "two")
    ended(page)
    assert text_of(page) == expected(running, messages[:2], temperature=1.5, seed=7, max_tokens=12)


@pytest.mark.parametrize("way", ["button", "escape"])
def test_an_answer_is_stopped_and_what_is_there_can_be_compared(opened: Open, way: str) -> None:
    llm = tiny_llm()
    slowed(llm, 0.05)
    with apart(llm) as slow:
        page = opened(slow.url)
        send(page)
        expect(page.locator(".figures")).to_contain_text("tokens/s")
        if way == "button":
            page.get_by_role("button", name="Stop").click()
        else:
            page.keyboard.press("Escape")
        ended(page)
        slow.wait_idle()
        expect(page.locator(".figures")).to_contain_text("stopped")
        count = int(page.locator("#count").inner_text())
        assert 0 < count < 200
        page.get_by_role("button", name="Compare").click()
        expect(page.locator(".verdict")).to_have_text(f"identical: all {count} token ids are the same", timeout=60_000)


# -- trees ---------------------------------------------------------------------------------------------------------


def test_the_tree_of_each_step_is_drawn_and_walked_through(opened: Open) -> None:
    page = opened()
    setting(page, max_tokens="40", shape="2x2x1")
    send(page)
    ended(page)
    steps = int(page.locator("#forwards").inner_text())
    told, slider = page.locator("#told"), page.get_by_role("slider", name="Step")
    expect(told).to_contain_text(f"Step {steps} of {steps}.")
    slider.focus()
    accepted = marked = 0
    for step in range(steps, 0, -1):
        expect(told).to_contain_text(f"Step {step} of {steps}.")
        said = told.inner_text()
        assert slider.get_attribute("aria-valuetext") == said
        assert page.locator("#tree .node.root").count() == page.locator("#tree .node.own").count() == 1
        drawn = {kind: page.locator(f"#tree .node.{kind}").count() for kind in ("accepted", "refused")}
        drafted, some = re.findall(r"(\d+) drafted, (\d+|none) accepted", said)[0] if "drafted" in said else ("0", "0")
        assert sum(drawn.values()) == int(drafted)
        assert drawn["accepted"] == int(some.replace("none", "0"))
        assert page.locator("#tree .edge").count() == sum(drawn.values()) + 1
        accepted += drawn["accepted"]
        marked += page.locator(".text .marked").count() > 0
        page.keyboard.press("ArrowLeft")
    assert accepted > 0
    assert marked >= steps - 1  # the last one may have no text
    assert accepted + steps >= int(page.locator("#count").inner_text())
    page.get_by_role("button", name="Step after").click()
    expect(told).to_contain_text("Step 2 of")
    page.locator(".text .word").first.click()
    expect(told).to_contain_text("Step 1 of")


def test_the_accepted_path_is_the_top_row_and_names_its_drafters(opened: Open) -> None:
    page = opened()
    fake(page, [one_step(" yes", " sir")])
    send(page)
    ended(page)
    expect(page.locator("#told")).to_have_text(
        "Step 1 of 1. 2 drafted, 1 accepted: “ yes”; the model added “ sir”.", use_inner_text=False
    )
    boxes = {kind: page.locator(f"#tree .node.{kind}") for kind in ("root", "accepted", "refused", "own")}
    tops = {kind: (box.get_attribute("transform") or "").split()[1] for kind, box in boxes.items()}
    assert tops["root"] == tops["accepted"] == tops["own"] != tops["refused"]
    assert "suffix, eagle" in (boxes["accepted"].locator("title").text_content() or "")
    assert boxes["accepted"].locator(".stripe").count() == 2
    assert boxes["accepted"].locator("text").text_content() == "·yes"
    words = page.locator(".text .word")
    assert words.all_text_contents() == ["yes", "sir"]
    assert [words.nth(i).get_attribute("title") for i in range(2)] == ["suffix, eagle", None]


# -- comparing -----------------------------------------------------------------------------------------------------


def test_plain_decoding_of_the_same_is_put_beside(opened: Open) -> None:
    page = opened()
    setting(page, max_tokens="30", temperature="1")
    with page.expect_request("**/chat/completions") as first:
        send(page)
    ended(page)
    with page.expect_request("**/chat/completions") as second:
        page.get_by_role("button", name="Compare").click()
    ended(page)
    drafted, plain = (sent(one.value) for one in (first, second))
    assert plain == drafted | {"speculation": "off"}
    assert "seed" in plain
    expect(page.locator(".verdict")).to_contain_text("identical: all")
    assert text_of(page, 0) == text_of(page, 1)
    assert (
        page.locator(".figures").nth(1).inner_text().replace("\xa0", " ").endswith("1.00 a forward · " + _seed(plain))
    )
    assert page.locator(".text").nth(1).locator("[title]").count() == 0


def _seed(body: dict[str, Any]) -> str:
    return f"seed {body['seed']}"


@pytest.mark.parametrize(
    ("ids", "said"),
    [([3, 5], "they differ from token 2 on; the 1 before are the same"), ([3], "they differ from token 2 on"),
     ([], "There are no token ids to compare.")],
)  # fmt: skip
def test_what_differs_is_not_called_identical(opened: Open, ids: list[int], said: str) -> None:
    page = opened()
    fake(page, [one_step("a", "b"), [part("ab", ids, [])]])
    send(page)
    ended(page)
    page.get_by_role("button", name="Compare").click()
    expect(page.locator(".verdict")).to_contain_text(said)
    expect(page.locator("body")).not_to_contain_text("identical")


# -- settings, keys, errors ----------------------------------------------------------------------------------------


def test_drafters_are_chosen(opened: Open) -> None:
    page = opened()
    bodies = fake(page, [one_step("a", "b")] * 4)

    def check(*labels: str) -> None:
        for label in labels:
            page.get_by_label(label, exact=True).check()

    expect(page.locator("#own")).to_have_text("(suffix, ngram)", use_inner_text=False)
    assert page.locator("#shapes option").count() > 3
    chosen = {"drafter": "recycling+suffix"}
    ways: list[tuple[Callable[[], object], Any]] = [
        (lambda: None, None),
        (lambda: check("recycling", "suffix"), chosen),
        (lambda: page.locator("[name=shape]").fill("chain:3"), chosen | {"shape": "chain:3"}),
        (lambda: check("none: speculation is off"), "off"),
    ]
    for choose, speculation in ways:
        page.get_by_role("button", name="Settings").click()
        choose()
        page.get_by_role("button", name="Done").click()
        send(page)
        ended(page)
        assert bodies[-1].get("speculation") == speculation
    assert len({body["seed"] for body in bodies}) == 4
    assert bodies[0]["temperature"] == 0
    assert page.get_by_role("button", name="Compare").count() == 3  # the last one was plain already


def test_a_key_is_asked_for_where_it_is_needed_and_kept(opened: Open) -> None:
    with apart(tiny_llm(), keys=("first", "sécret")) as served:
        page = opened(served.url)
        asks = page.get_by_role("dialog", name="This server wants a key")
        for key, shown in (("wrong", True), ("sécret", False)):
            expect(asks).to_be_visible()
            asks.get_by_label("Key", exact=True).fill(key)
            page.keyboard.press("Enter")
            expect(asks).to_be_visible() if shown else expect(asks).not_to_be_visible()
        setting(page, max_tokens="5")
        send(page)
        ended(page)
        assert text_of(page)
        page.reload()
        expect(page.locator("#model")).to_have_text("tiny")
        assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        served.wait_idle()


def test_it_waits_for_the_model(opened: Open) -> None:
    with apart(None) as served:
        page = opened(served.url)
        expect(page.get_by_role("alert")).to_have_text("The model is still being loaded.")
        served.service.start(tiny_llm())
        expect(page.locator("#model")).to_have_text("tiny")
        expect(page.get_by_role("alert")).to_be_hidden()


def test_what_the_server_refuses_is_told_and_can_be_sent_again(opened: Open) -> None:
    page = opened()
    setting(page, shape="round")
    send(page)
    expect(page.get_by_role("alert")).to_contain_text("Speculation: 'round' is not a shape")
    expect(page.get_by_label("Message", exact=True)).to_have_value(PROMPT)
    assert page.locator(".turn").count() == 0
    setting(page, shape="", max_tokens="5")
    page.get_by_role("button", name="Send").click()
    ended(page)
    expect(page.get_by_role("alert")).to_be_hidden()
    assert text_of(page)


# -- what it looks like --------------------------------------------------------------------------------------------


def test_texts_are_put_in_as_text(opened: Open) -> None:
    page = opened()
    evil = '<img src="x" onerror="alert(1)"><script>alert(2)</script>'
    fake(page, [one_step(evil, "</div>")])
    send(page, evil)
    ended(page)
    assert text_of(page) == f"{evil}</div>"
    assert page.locator(".asked").text_content() == evil
    assert page.locator("main img, main script").count() == 0


def test_parts_of_characters_are_put_together(opened: Open) -> None:
    page = opened()
    halves = [node(1, "?", -1, [], True), node(2, "\ufffd", 0, ["ngram"], True)]
    fake(page, [[
        part("", [2, 3], [{"nodes": halves, "bonus": {"token": 3, "text": "\ufffd"}}]),
        part("🌳 tree", [4, 5], [{"nodes": [halves[0], node(4, "\ufffd", 0, ["suffix"], True)],
                                 "bonus": {"token": 5, "text": " tree"}}]),
        part("", [9], [{"nodes": halves[:1], "bonus": {"token": 9, "text": "<|end|>"}}]),
    ]])  # fmt: skip
    send(page)
    ended(page)
    assert text_of(page) == "🌳 tree"
    words = page.locator(".text .word")
    assert words.all_text_contents() == ["🌳", "tree"]
    assert [words.nth(i).get_attribute("title") for i in range(2)] == ["ngram, suffix", None]


@pytest.mark.parametrize("width", [360, 700, 1280])
def test_it_fits_every_width(opened: Open, width: int) -> None:
    page = opened(viewport={"width": width, "height": 740})
    fake(page, [one_step("a" * 300, " end"), one_step("a" * 300, " end")])
    send(page, "b" * 300)
    ended(page)
    page.get_by_role("button", name="Compare").click()
    ended(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.get_by_role("button", name="Settings").click()
    box = page.get_by_role("dialog", name="Settings").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width


def test_it_is_dark_where_the_system_is(opened: Open) -> None:
    grounds = [
        opened(color_scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor")
        for scheme in ("light", "dark")
    ]
    assert grounds == ["rgb(247, 247, 245)", "rgb(21, 23, 26)"]


def test_it_is_used_by_keyboard_alone_and_can_be_heard(opened: Open) -> None:
    page = opened()
    fake(page, [one_step("a", "b"), one_step("a", "b")])
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    ended(page)
    assert page.locator(".asked").text_content() == "one\ntwo"
    log = page.get_by_role("log")
    assert log.get_attribute("aria-live") == "polite"
    assert log.locator(".answer").get_attribute("aria-busy") == "false"
    page.keyboard.press("Shift+Tab")
    focused = page.locator(":focus")
    assert focused.inner_text() == "Compare with plain"
    assert focused.evaluate("one => getComputedStyle(one).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("identical")
    unnamed = page.locator("button, input, textarea, [tabindex]").evaluate_all(
        "all => all.filter(one => !(one.labels?.length || one.ariaLabel || one.innerText.trim())).map(one => one.id)"
    )
    assert unnamed == []


def test_a_server_that_is_gone_is_told(opened: Open) -> None:
    page = opened()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    expect(page.locator("#model")).to_have_text("tiny")
    send(page)
    expect(page.get_by_role("alert")).to_have_text("The server can't be reached.")
