"""A real Chromium, spoken to by its own protocol: pages as users see them."""

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from websockets.sync.client import ClientConnection, connect

_SECONDS = 60.0  # Long: a machine may be busy.


def find_chromium() -> str | None:
    """The program, or None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return os.environ.get("CHROMIUM") or next((at for name in names if (at := shutil.which(name))), None)


class Browser:
    """One page. ``problems``: what its console said, and what it was refused by its policy."""

    def __init__(self, program: str) -> None:
        self._open = contextlib.ExitStack()
        self._home = tempfile.mkdtemp(prefix="stroma-chromium-")
        command = [
            program,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--hide-scrollbars",
            f"--user-data-dir={self._home}",
            "--remote-debugging-port=0",
            "about:blank",
        ]
        self._log = open(os.path.join(self._home, "stderr"), "wb")  # noqa: SIM115
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self._log)
        self._ids = itertools.count(1)
        self._events: list[dict[str, Any]] = []
        self.problems: list[str] = []
        try:
            self._socket = self._connect()
        except BaseException:
            self.close()
            raise
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def _connect(self) -> ClientConnection:
        port_file = Path(self._home, "DevToolsActivePort")
        deadline = time.monotonic() + _SECONDS
        while not (port_file.exists() and port_file.read_text().count("\n")):
            assert self._process.poll() is None, Path(self._home, "stderr").read_text(errors="replace")[
                -2000:
            ]
            assert time.monotonic() < deadline, "the browser does not start"
            time.sleep(0.02)
        port, path = port_file.read_text().splitlines()[:2]
        with connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None) as whole:
            target = self._new_page(whole)
        return self._open.enter_context(
            connect(f"ws://127.0.0.1:{port}/devtools/page/{target}", max_size=None, proxy=None)
        )

    @staticmethod
    def _new_page(whole: ClientConnection) -> str:
        whole.send(json.dumps({"id": 1, "method": "Target.createTarget", "params": {"url": "about:blank"}}))
        target: str = json.loads(whole.recv(timeout=_SECONDS))["result"]["targetId"]
        return target

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._open.close()  # Now: a browser that is there takes seconds to say goodbye.
        self._log.close()
        shutil.rmtree(self._home, ignore_errors=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=_SECONDS))
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method", ""), message.get("params", {})
        if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.problems.append(str(params["args"]))
        elif method == "Page.javascriptDialogOpening":
            self.problems.append(f"a dialog: {params['message']}")
        self._events.append(message)

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def without_scripts(self, off: bool = True) -> None:
        self.call("Emulation.setScriptExecutionDisabled", value=off)

    def goto(self, url: str) -> None:
        """Open an address, and wait until the page is there."""
        self._events.clear()
        answer = self.call("Page.navigate", url=url)
        assert "errorText" not in answer, answer
        loader = answer.get("loaderId")  # None: another place of the same page, which is there.
        if loader is not None:
            self._wait_for_load(lambda loaded: loaded == loader)

    def submit(self, button: str) -> None:
        """Click a button, named by a selector, that loads a page, and wait until the page is there."""
        before = self.call("Page.getFrameTree")["frameTree"]["frame"]["loaderId"]
        self._events.clear()
        self.eval(f"document.querySelector({json.dumps(button)}).click()")
        self._wait_for_load(lambda loaded: loaded != before)

    def _wait_for_load(self, is_wanted: Callable[[str], bool]) -> None:
        """Wait until a document is loaded; the page before it may still report its own end of loading."""
        while not any(
            event.get("method") == "Page.lifecycleEvent"
            and event["params"]["name"] == "load"
            and is_wanted(event["params"]["loaderId"])
            for event in self._events
        ):
            self._note(json.loads(self._socket.recv(timeout=_SECONDS)))

    def eval(self, code: str) -> Any:
        """What an expression comes to in the page."""
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, code: str, wanted: Callable[[Any], bool] = bool) -> Any:
        """Wait until an expression comes to what is wanted."""
        deadline = time.monotonic() + _SECONDS
        while not wanted(value := self.eval(code)):
            assert time.monotonic() < deadline, (code, value)
            time.sleep(0.02)
        return value

    def press(self, key: str) -> None:
        """One key, as a keyboard sends it."""
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = {"Enter": 13, "Escape": 27, "Tab": 9}.get(key, ord(key.upper()) if len(key) == 1 else 0)
        about = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def write(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def screenshot(self, path: str | os.PathLike[str]) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=False)["data"]
        Path(path).write_bytes(base64.b64decode(data))
