"""A headless Chromium, driven through its DevTools protocol, for tests of what a person sees."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)
_TIMEOUT_SECONDS = 20.0
_KEYS = {
    "Enter": {"code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"},
    "Escape": {"code": "Escape", "windowsVirtualKeyCode": 27},
    "ArrowUp": {"code": "ArrowUp", "windowsVirtualKeyCode": 38},
}


class Chromium:
    """The browser. Every page has its own storage."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None, "there is no chromium to start"
        self._process = subprocess.Popen(
            [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._until_closed = ExitStack()
        self._connection = self._connect(profile / "DevToolsActivePort")
        self._next_id = 0
        self.events: dict[str, list[dict[str, Any]]] = {}  # by session

    def _connect(self, port_file: Path) -> ClientConnection:
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while not (port_file.exists() and "\n" in port_file.read_text()):
            assert time.monotonic() < deadline, "chromium did not start"
            time.sleep(0.05)
        port = port_file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/version", timeout=5) as answer:
            url = json.load(answer)["webSocketDebuggerUrl"]
        return self._until_closed.enter_context(connect(url, max_size=None))

    def call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        """Call the protocol, and keep the events that come before the answer."""
        self._next_id += 1
        request = {"id": self._next_id, "method": method, "params": parameters}
        self._connection.send(json.dumps(request | ({"sessionId": session} if session else {})))
        while True:
            answer = json.loads(self._connection.recv(timeout=_TIMEOUT_SECONDS))
            if answer.get("id") == self._next_id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.setdefault(answer.get("sessionId", ""), []).append(answer)

    def open(self, url: str) -> Page:
        """A page in a fresh context."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = Page(self, attached["sessionId"], context)
        page.visit(url)
        return page

    def close(self) -> None:
        self._until_closed.close()
        self._process.terminate()
        self._process.wait(_TIMEOUT_SECONDS)


class Page:
    """One page, and a person's hands and eyes on it."""

    def __init__(self, browser: Chromium, session: str, context: str) -> None:
        self._browser = browser
        self._session = session
        self._context = context
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        return self._browser.call(method, self._session, **parameters)

    def visit(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for(
            "document.readyState === 'complete' && document.location.href !== 'about:blank'"
        )

    def reload(self) -> None:
        self.evaluate("globalThis.isOld = true")
        self.call("Page.reload")
        self.wait_for("!globalThis.isOld && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise's value when it is settled."""
        result = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, condition: str, seconds: float = _TIMEOUT_SECONDS) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < deadline, f"never true: {condition}\n{self.text('body')}"
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """The text that is visible in the first element that matches; "" if there is none."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def count(self, selector: str) -> int:
        return self.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length")

    def click(self, selector: str) -> None:
        """A click of the mouse on the middle of the element, which has to be visible there."""
        middle = self.evaluate(
            f"""(() => {{
              const target = document.querySelector({json.dumps(selector)});
              target.scrollIntoView({{ block: "nearest" }});
              const box = target.getBoundingClientRect();
              const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
              return {{ x, y, isThere: target.contains(document.elementFromPoint(x, y)) }};
            }})()"""
        )
        assert middle["isThere"], f"{selector} is hidden or covered"
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=middle["x"],
                y=middle["y"],
                button="left",
                clickCount=1,
            )

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        for kind in ("keyDown", "keyUp"):
            modifiers = 8 if shift else 0
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, modifiers=modifiers, **_KEYS[key]
            )

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def complaints(self) -> list[str]:
        """What the browser logged as wrong: exceptions, refused content, errors of the console.

        Answers of the server with an error status are not among them.
        """
        self.evaluate("null")  # collects the events so far
        found = []
        for event in self._browser.events.get(self._session, []):
            entry = event["params"].get("entry", {})
            if event["method"] == "Runtime.exceptionThrown" or (
                entry.get("level") in ("error", "warning") and entry.get("source") != "network"
            ):
                found.append(json.dumps(event["params"])[:1000])
        return found

    def close(self) -> None:
        self._browser.call("Target.disposeBrowserContext", browserContextId=self._context)
