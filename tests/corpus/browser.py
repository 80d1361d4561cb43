"""A headless Chromium, spoken to over its debugging pipe: no port, no package."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = (
    "chromium-headless-shell", "chrome-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable",
    "headless_shell",
)  # fmt: skip
TIMEOUT_S = 60.0


@cache
def find_browser() -> str | None:
    """Path of a Chromium that starts, or None: some systems have a stand-in that only says how to install one."""
    for name in NAMES:
        path = shutil.which(name)
        if (
            path
            and subprocess.run([path, "--version"], capture_output=True, timeout=TIMEOUT_S, check=False).returncode == 0
        ):
            return path
    return None


class Browser:
    """One page of one browser: `open` loads a file, `evaluate` answers from it. Whatever the page asked for or complained
    about since is in `requests` and `complaints`."""

    def __init__(self, executable: str, profile: Path) -> None:
        to_browser, from_us = os.pipe()
        from_browser, to_us = os.pipe()

        def place() -> None:  # Chromium reads commands from 3 and answers on 4
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (to_browser, to_us)]
            for fd, at in zip(high, (3, 4), strict=True):
                os.dup2(fd, at)

        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]  # fmt: skip
        self.log = open(profile / "stderr", "wb")  # noqa: SIM115
        self.process = subprocess.Popen(
            [executable, *flags], stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, close_fds=False,
            preexec_fn=place,
        )  # fmt: skip
        os.close(to_browser)
        os.close(to_us)
        self.out, self.into = from_us, from_browser
        self.rest, self.number, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def __enter__(self) -> Browser:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.into)
        self.log.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises AssertionError with the browser's message if it fails."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])
            self._note(answer)

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_S
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.into], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no answer from the browser within {TIMEOUT_S} s"
            block = os.read(self.into, 1 << 16)
            assert block, f"the browser ended: {Path(self.log.name).read_text(errors='replace')[-2000:]}"
            self.rest += block
        line, _, self.rest = self.rest.partition(b"\0")
        return dict(json.loads(line))

    def _note(self, event: dict[str, Any]) -> None:
        facts = event.get("params", {})
        self.events.append(event)
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(facts["request"]["url"])
            case "Runtime.consoleAPICalled":
                self.complaints.append(f"console.{facts['type']}: {facts['args']}")
            case "Runtime.exceptionThrown":
                self.complaints.append(str(facts["exceptionDetails"]))
            case "Log.entryAdded":
                self.complaints.append(facts["entry"]["text"])

    def open(self, page: Path, *, width: int, height: int = 844, dark: bool = False) -> None:
        """Load a page in a window of this size in CSS pixels, below 600 a phone's, and wait until it is there."""
        self.events, self.requests, self.complaints = [], [], []
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.absolute().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self._note(self._next())

    def press(self, key: str) -> None:
        """Press and release a key: Tab or Enter."""
        code = {"Tab": 9, "Enter": 13}[key]
        more = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                **(more if kind == "keyDown" else {}),
            )  # fmt: skip

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, as JSON knows it."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")
