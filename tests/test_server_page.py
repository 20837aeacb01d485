"""The chat page, in a headless Chromium: what a person does with it, and what a model cannot."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hybridk2.chat.events import (
    Event,
    Finished,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from hybridk2.checkpoint import LoadProgress
from hybridk2.errors import OutOfMemoryError
from hybridk2.server import sse
from hybridk2.server.openai import ChatEncoder
from hybridk2.server.security import gate
from tests.browser import CHROMIUM, Chromium, Page
from tests.scripted_assistant import USAGE, calls, says
from tests.scripted_engine import ScriptedEngine, until
from tests.served import HOST, Served, serving, serving_nano

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

PAGE = Path(__file__).resolve().parents[1] / "hybridk2" / "server" / "page"
KEY = "a-key-of-sixteen-characters"
TOOLS = """[{"type": "function", "function": {"name": "get_weather",
  "description": "Retrieve current weather information. Call this for the weather.",
  "parameters": {"type": "object", "required": ["city"],
    "properties": {"city": {"type": "string", "description": "Name of the city"}}}}}]"""
SPEED = r"prefill [\d.]+ tok/s · decode [\d.]+ tok/s · context [\d,]+ of 4,096"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def nano() -> Iterator[Served]:
    with serving_nano() as served:
        yield served


@pytest.fixture(scope="module")
def scripted_server() -> Iterator[tuple[ScriptedEngine, Served]]:
    model = ScriptedEngine()
    with serving(lambda on_progress: model) as served:
        yield model, served


@pytest.fixture
def visit(chromium: Chromium) -> Iterator[Callable[[Served], Page]]:
    """Opens pages, and holds afterwards that the browser had nothing to complain of."""
    pages: list[Page] = []

    def open_page(served: Served) -> Page:
        pages.append(chromium.open(served.url))
        return pages[-1]

    yield open_page
    for page in pages:
        complaints = page.complaints()
        page.close()
        assert complaints == []


@pytest.fixture
def model(scripted_server: tuple[ScriptedEngine, Served]) -> ScriptedEngine:
    scripted, _ = scripted_server
    scripted.scripts.clear()
    scripted.replies.clear()
    return scripted


@pytest.fixture
def page(scripted_server: tuple[ScriptedEngine, Served], visit: Callable[[Served], Page]) -> Page:
    """A page of the scripted model, ready to be written into."""
    _, served = scripted_server
    page = visit(served)
    page.wait_for("document.querySelector('#model').textContent")
    return page


def messages(model: ScriptedEngine, request: int) -> list[dict[str, str]]:
    """The conversation that the page sent in its request of that number."""
    return [dict(message) for message in model.replies[request].options["messages"]]


def ask(page: Page, text: str) -> None:
    page.click("#input")
    page.type(text)
    page.press("Enter")


def wait_for_reply(page: Page) -> None:
    page.wait_for("!document.querySelector('.streaming, #stop:not([hidden])')")


# ------------------------------------------------------------------- the files, without a browser


def test_the_page_names_no_other_host_and_no_way_from_text_to_markup() -> None:
    for name in ("chat.html", "chat.css", "chat.js"):
        source = (PAGE / name).read_text()
        hosts = set(re.findall(r"https?://[\w.-]+", source))
        assert hosts <= {"http://www.w3.org"}, name  # the names of SVG, which are never fetched
        for danger in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert danger not in source, f"{name}: {danger}"


def test_the_page_is_served_under_a_strict_policy_and_needs_no_key(nano: Served) -> None:
    with serving(
        lambda on_progress: ScriptedEngine(), the_gate=gate((KEY.encode(),), HOST, ())
    ) as (locked):
        for path in ("/", "/chat.js", "/chat.css"):
            answer = locked.get(path)
            assert answer.status_code == 200
            policy = answer.headers["content-security-policy"].split("; ")
            assert {"default-src 'none'", "script-src 'self'", "trusted-types 'none'"} <= {*policy}
            assert answer.headers["x-content-type-options"] == "nosniff"
            again = locked.get(path, headers={"If-None-Match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
        assert locked.get("/v1/models").status_code == 401


# ------------------------------------------------------------------- with K2-nano


@needs_chromium
def test_a_question_is_answered_and_the_conversation_is_kept(
    nano: Served, visit: Callable[[Served], Page]
) -> None:
    page = visit(nano)
    assert "What shall we think about?" in page.text("main")
    ask(page, "which one is bigger, 9.11 or 9.9? think carefully.")
    page.wait_for("document.querySelector('#speed').textContent")
    assert "9.9 is bigger than 9.11" in page.text(".assistant .text")
    assert re.fullmatch(r"Thought for .*", page.text(".thought summary"))
    assert page.text(".reasoning") == ""  # folded
    page.click(".thought summary")
    assert "9.90" in page.text(".reasoning")
    assert re.match(SPEED, page.text("#speed"))
    page.reload()
    page.wait_for("document.querySelector('#conversations .open')")
    assert page.text("#messages") == ""
    page.click("#conversations .open")
    assert "9.9 is bigger than 9.11" in page.text(".assistant .text")
    assert re.match(SPEED, page.text("#speed"))


@needs_chromium
def test_a_tool_call_is_shown_and_its_result_is_asked_for(
    nano: Served, visit: Callable[[Served], Page]
) -> None:
    page = visit(nano)
    page.click("#settings")
    page.click("#settings-dialog [name=tools]")
    page.type(TOOLS)
    page.click("#settings-dialog [name=temperature]")
    page.type("0")
    page.click("#settings-dialog button[value=save]")
    ask(page, "What's the weather like in Beijing today? Use the tool to check.")
    page.wait_for("document.querySelector('.call button:not(:disabled)')")
    assert "get_weather" in page.text(".call header")
    assert page.text(".call pre") == '{\n  "city": "Beijing"\n}'
    page.click(".call textarea")
    page.type('{"weather": "Sunny"}')
    page.click(".call button")
    page.wait_for("document.querySelectorAll('.assistant').length === 2")
    wait_for_reply(page)
    assert "Sunny" in page.text(".assistant:last-child .text")


@needs_chromium
def test_a_server_with_a_key_asks_for_it_once(visit: Callable[[Served], Page]) -> None:
    model = ScriptedEngine()
    model.scripts.append(says("welcome"))
    the_gate = gate((KEY.encode(),), HOST, ())
    with serving(lambda on_progress: model, the_gate=the_gate) as served:
        page = visit(served)
        page.wait_for("document.querySelector('#key-dialog').open")
        page.click("#key-dialog input")
        page.type(KEY)
        page.click("#key-dialog button[value=save]")
        page.wait_for("document.querySelector('#model').textContent === 'nano'")
        ask(page, "hello")
        wait_for_reply(page)
        assert page.text(".assistant .text") == "welcome"
        assert KEY not in page.evaluate("JSON.stringify(localStorage)")


@needs_chromium
def test_a_question_waits_for_a_model_that_is_being_loaded(
    visit: Callable[[Served], Page],
) -> None:
    loaded = threading.Event()
    model = ScriptedEngine()
    model.scripts.append(says("at last"))

    def load(on_progress: Callable[[LoadProgress], None]) -> ScriptedEngine:
        on_progress(LoadProgress("loading experts", 148_500_000_000, 594_000_000_000, 60.0))
        assert loaded.wait(60)
        return model

    with serving(load, wait=False) as served:
        page = visit(served)
        page.wait_for("document.querySelector('#notice').innerText.includes('25 % of 594.0 GB')")
        ask(page, "hello")
        assert "25 %" in page.text("#notice")
        loaded.set()
        page.wait_for("document.querySelector('.assistant .text')?.innerText === 'at last'")
        assert page.text("#notice") == ""


# ------------------------------------------------------------------- with scripted replies

HOSTILE = """\
<img src=x onerror="globalThis.hit = 1"> <script>globalThis.hit = 1</script>

# <b onclick="globalThis.hit = 1">title</b>

[a](javascript:globalThis.hit=1) [b](data:text/html,x) [c](JaVaScRiPt:x) [d](//host/x) [e](/x)

![i](https://elsewhere.example/track.png) <https://elsewhere.example/>

- <iframe src="javascript:globalThis.hit=1"></iframe>

| <svg onload="globalThis.hit=1"> | x |
|---|---|
| <style>*{display:none}</style> | `<script>globalThis.hit=1</script>` |

```<script>globalThis.hit=1</script>
</code></pre><script>globalThis.hit = 1</script>
```
"""


@needs_chromium
def test_what_a_model_writes_never_becomes_markup(model: ScriptedEngine, page: Page) -> None:
    thought: list[Event] = [ReasoningDelta(HOSTILE)]
    tool = [
        ToolCallStart(0, "functions.f:0", "<img src=x onerror=globalThis.hit=1>"),
        ToolCallArguments(0, '{"a": "<script>globalThis.hit=1</script>"}'),
        ToolCallEnd(0, '{"a": "<script>globalThis.hit=1</script>"}'),
        Finished("tool_calls", USAGE),
    ]
    model.scripts.append([*thought, *(TextDelta(character) for character in HOSTILE), *tool])
    ask(page, f"<b>{HOSTILE}</b>")
    wait_for_reply(page)
    forbidden = "script, img, iframe, style, svg:not(.icon svg, header > svg), b[onclick]"
    assert page.count(f"#messages :is({forbidden})") == 0
    assert page.evaluate("globalThis.hit") is None
    links = page.evaluate("[...document.querySelectorAll('#messages a')].map((a) => a.href)")
    assert set(links) <= {
        "https://elsewhere.example/",
        "https://elsewhere.example/track.png",
    }
    assert page.evaluate(
        "[...document.querySelectorAll('#messages a')].every((a) => a.rel.includes('noopener'))"
    )
    shown = page.text(".assistant .text")
    assert '<img src=x onerror="globalThis.hit = 1">' in shown
    assert "</code></pre><script>" in shown


@needs_chromium
def test_even_a_mistake_in_the_script_could_not_make_markup_of_text(
    chromium: Chromium, scripted_server: tuple[ScriptedEngine, Served]
) -> None:
    page = chromium.open(scripted_server[1].url)
    attempt = """(() => {
      try { document.createElement("p").innerHTML = "<b>bold</b>"; } catch { return "refused"; }
    })()"""
    assert page.evaluate(attempt) == "refused"
    assert "TrustedHTML" in page.complaints()[0]
    page.close()


@needs_chromium
def test_a_reply_that_waits_says_what_for(
    model: ScriptedEngine, page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "PING_SECONDS", 0.05)
    model.going.clear()
    try:
        ask(page, "?")
        page.wait_for("document.querySelector('.waiting')?.innerText === 'queued, 0 ahead'")
    finally:
        model.going.set()
    wait_for_reply(page)
    assert page.text(".assistant .text") == "hello world"


MARKDOWN = """\
# A heading

Some *emphasis*, **strength**, ~~regret~~, `code *not*`, snake_case_name, 2 * 3 * 4 and
a second line. See [this](https://example.org/a) or https://example.org/b.

> quoted
> > twice

1. one
2. two
   - nested **item**
   - another

   with a paragraph

```python
def f():
    return "<b>" # not **bold**
```

| a | b |
|---|:-:|
| 1 | `x` |

---

- [ ] last
"""


@needs_chromium
def test_markdown_is_shown_the_same_however_it_is_cut(model: ScriptedEngine, page: Page) -> None:
    whole = [TextDelta(MARKDOWN), Finished("stop", USAGE)]
    cut = [*(TextDelta(character) for character in MARKDOWN), Finished("stop", USAGE)]
    shown = []
    for script in (whole, cut):
        model.scripts.append(script)
        page.click("#new")
        ask(page, "?")
        wait_for_reply(page)
        shown.append(page.evaluate("document.querySelector('.assistant .text').innerHTML"))
    assert shown[0] == shown[1]
    for selector, text in {
        "h3": "A heading",
        "em": "emphasis",
        "strong": "strength",
        "del": "regret",
        "p code": "code *not*",
        "blockquote blockquote": "twice",
        "ol > li > ul > li strong": "item",
        ".codeblock code": 'def f():\n    return "<b>" # not **bold**',
        ".codeblock header span": "python",
        "td code": "x",
    }.items():
        assert page.text(f".assistant .text {selector}") == text, selector
    paragraph = page.text(".assistant .text p")
    assert "snake_case_name, 2 * 3 * 4 and\na second line." in paragraph
    assert page.count(".assistant .text a") == 2
    assert page.count(".assistant .text hr") == 1


@needs_chromium
@pytest.mark.parametrize("piece", ["**a [b](", "`", "> ", "- ", "*a _b ~~", "|-", "[", "#  "])
def test_text_made_to_be_slow_is_shown_in_time(
    model: ScriptedEngine, page: Page, piece: str
) -> None:
    model.scripts.append([TextDelta(piece * 20_000), Finished("stop", USAGE)])
    ask(page, "?")
    # The same amount of plain text takes 0.2 s; what is quadratic takes minutes.
    wait_for_reply(page)


@needs_chromium
def test_escape_stops_a_reply_and_retry_asks_again(model: ScriptedEngine, page: Page) -> None:
    model.scripts.append([ReasoningDelta("Hm."), TextDelta("Half")])  # and no end
    ask(page, "?")
    page.wait_for("document.querySelector('.assistant .text')?.innerText === 'Half'")
    page.press("Escape")
    wait_for_reply(page)
    assert page.text(".assistant .mistake") == "Stopped."
    assert until(lambda: model.replies[0].cancelled), "the server did not hear of it"
    model.scripts.append(says("Whole"))
    page.click(".assistant .retry")
    page.wait_for("document.querySelector('.assistant .text')?.innerText === 'Whole'")
    assert page.count(".message") == 2
    assert messages(model, 0) == messages(model, 1)


@needs_chromium
def test_a_reply_that_fails_says_why_and_keeps_what_came(model: ScriptedEngine, page: Page) -> None:
    call = calls("get_weather", "{}")[:-1]
    model.scripts.append([TextDelta("Half"), *call, OutOfMemoryError("host memory")])
    ask(page, "?")
    page.wait_for("document.querySelector('.assistant .mistake')?.innerText")
    assert "out of memory" in page.text(".assistant .mistake")
    assert page.text(".assistant .text") == "Half"
    assert page.count(".call") == 0  # what is not whole must not be answered


@needs_chromium
def test_a_connection_that_ends_early_is_not_taken_for_the_end_of_the_reply(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    for frames in ("event", "end"):
        monkeypatch.setattr(ChatEncoder, frames, lambda *_: b"")
    ask(page, "?")
    page.wait_for("document.querySelector('.assistant .mistake')?.innerText")
    assert page.text(".assistant .mistake") == "The connection ended before the reply did."


@needs_chromium
def test_a_new_line_an_edit_and_thoughts_of_earlier_turns(
    model: ScriptedEngine, page: Page
) -> None:
    model.scripts += [says("First.", thinking="Well"), says("Second.")]
    page.click("#input")
    page.type("one")
    page.press("Enter", shift=True)
    page.type("two")
    page.press("Enter")
    wait_for_reply(page)
    assert messages(model, 0) == [{"role": "user", "content": "one\ntwo"}]
    page.press("ArrowUp")
    page.type("!")
    page.press("Enter")
    page.wait_for("document.querySelector('.assistant .text')?.innerText === 'Second.'")
    assert messages(model, 1) == [{"role": "user", "content": "one\ntwo!"}]
    model.scripts.append(says("Third."))
    ask(page, "more")
    page.wait_for("document.querySelectorAll('.assistant').length === 2")
    wait_for_reply(page)
    assert [message["role"] for message in messages(model, 2)] == ["user", "assistant", "user"]


@needs_chromium
def test_a_conversation_goes_on_while_another_is_looked_at(
    model: ScriptedEngine, page: Page
) -> None:
    model.scripts += [[TextDelta("Slow")], says("Quick one.")]
    ask(page, "slow")
    page.wait_for("document.querySelector('.assistant .text')?.innerText === 'Slow'")
    page.click("#new")
    ask(page, "quick")
    page.wait_for("document.querySelector('.assistant .text')?.innerText === 'Quick one.'")
    model.replies[0].steps = [TextDelta(" one")]
    assert until(lambda: not model.replies[0].steps)
    page.click("#conversations .open[title=slow]")
    page.wait_for("document.querySelector('.assistant .text')?.innerText === 'Slow one'")
    model.replies[0].steps = says(", done.")
    wait_for_reply(page)
    assert page.text(".assistant .text") == "Slow one, done."


@needs_chromium
def test_a_phone_shows_everything_without_scrolling_sideways(
    model: ScriptedEngine, page: Page
) -> None:
    page.call(
        "Emulation.setDeviceMetricsOverride",
        width=360,
        height=700,
        deviceScaleFactor=2,
        mobile=True,
    )
    model.scripts.append(says(f"{MARKDOWN}\n\n```\n{'wide ' * 40}\n```\n{'word' * 60}"))
    ask(page, "?")
    wait_for_reply(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("document.querySelector('#log').scrollWidth") <= 360
    page.click("#menu")
    page.wait_for("document.querySelector('#sidebar').getBoundingClientRect().left === 0")
    page.click("#new")
    page.wait_for("document.querySelector('#sidebar').getBoundingClientRect().right <= 0")
    assert page.text("#welcome h2")
