"""Headless Chromium, driven over a pipe by its DevTools protocol."""

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --remote-debugging-pipe"
KEYS = {"ArrowDown": 40, "ArrowUp": 38, "ArrowLeft": 37, "ArrowRight": 39, "Tab": 9, "Enter": 13}


class Page:
    """One page of a browser. events: what it has reported so far, by name of the event."""

    def __init__(self, to_browser: int, from_browser: int):
        self.to_browser, self.from_browser = to_browser, from_browser
        self.numbers, self.session, self.rest = itertools.count(1), None, b""
        self.events: list[tuple[str, dict]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict:
        """Result of a command of the protocol."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._read()
            if reply.get("id") == number:
                assert "error" not in reply, reply
                return reply["result"]
            self.events.append((reply.get("method", ""), reply.get("params", {})))

    def _read(self) -> dict:
        while b"\0" not in self.rest:
            part = os.read(self.from_browser, 1 << 20)
            assert part, "the browser has ended"
            self.rest += part
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, path: Path, dark: bool = False, width: int = 1200) -> None:
        """Open a file, and wait until it has loaded."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(name == "Page.loadEventFired" for name, _ in self.events):
            reply = self._read()
            self.events.append((reply.get("method", ""), reply.get("params", {})))

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression. Fails where it throws."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key, as a person does."""
        for kind in ("rawKeyDown", "keyUp"):
            code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
            self.call("Input.dispatchKeyEvent", type=kind, **code)

    def faults(self) -> list[dict]:
        """Errors and warnings of the console, exceptions, and requests beside the file's own."""
        faults = []
        for name, params in self.events:
            entry = params.get("entry", {})
            if name == "Runtime.exceptionThrown" or name == "Runtime.consoleAPICalled":
                faults.append(params)
            elif name == "Log.entryAdded" and entry.get("level") in ("error", "warning"):
                faults.append(entry)
            elif name == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if not url.startswith(("file:", "data:")):
                    faults.append({"url": url})
        return faults


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """Headless browser with a new profile in `folder`."""
    to_browser, from_browser = os.pipe(), os.pipe()
    command = f"exec {CHROMIUM} {FLAGS} --user-data-dir={folder} 3<&{to_browser[0]} "
    process = subprocess.Popen(
        ["bash", "-c", f"{command} 4>&{from_browser[1]}"],
        pass_fds=(to_browser[0], from_browser[1]),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    try:
        yield Page(to_browser[1], from_browser[0])
    finally:
        process.terminate()
        process.wait(20)
        os.close(to_browser[1])
        os.close(from_browser[0])
