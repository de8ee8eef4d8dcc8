# SPDX-License-Identifier: Apache-2.0
"""A browser without a window, driven by the W3C WebDriver protocol over plain HTTP."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
DRIVER = shutil.which("chromedriver")
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",  # containers have no user namespaces
    "--disable-gpu",
    "--disable-dev-shm-usage",
    # Every name but this machine's own leads nowhere: a page must not miss the internet.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
KEYS = {"Escape": "\ue00c", "Left": "\ue012", "Up": "\ue013", "Right": "\ue014", "Down": "\ue015"}
SECONDS = 60


class Browser:
    """Chromium, until `close`."""

    def __init__(self, log: Path, *, width: int = 1200, height: int = 800) -> None:
        assert CHROMIUM is not None
        assert DRIVER is not None
        self._log = open(log, "w+")  # noqa: SIM115
        self._driver = subprocess.Popen([DRIVER, "--port=0"], stdout=self._log, stderr=self._log)
        self._root = f"http://127.0.0.1:{self._port(log)}"
        options = {"binary": CHROMIUM, "args": [*ARGUMENTS, f"--window-size={width},{height}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self._send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._root += f"/session/{made['sessionId']}"

    def _port(self, log: Path) -> str:
        deadline = time.monotonic() + SECONDS
        while "successfully on port " not in (text := log.read_text()):
            assert time.monotonic() < deadline, text
            time.sleep(0.05)
        return text.split("successfully on port ")[1].split(".")[0]

    def _send(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._root + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None

    def close(self) -> None:
        """Ends the browser and its driver."""
        try:
            self._send("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait(SECONDS)
            self._log.close()

    def open(self, address: str) -> None:
        """Opens a page; what earlier ones said in the log is forgotten."""
        self._send("POST", "/url", {"url": "about:blank"})
        self.complaints()
        self._send("POST", "/url", {"url": address})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a script that returns."""
        return self._send("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script: str, seconds: float = 30) -> Any:
        """The value of a script once it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"{script} stayed false: {self.complaints()}"
            time.sleep(0.1)
        return value

    def press(self, *keys: str) -> None:
        """Presses keys one after the other: characters, or names of KEYS."""
        actions = [
            {"type": kind, "value": KEYS.get(key, key)}
            for key in keys
            for kind in ("keyDown", "keyUp")
        ]
        self._act({"type": "key", "id": "keys", "actions": actions})

    def point(self, x: float, y: float) -> None:
        """Moves the pointer to a position in the window."""
        move = {"type": "pointerMove", "x": round(x), "y": round(y), "duration": 0}
        mouse = {"parameters": {"pointerType": "mouse"}, "actions": [move]}
        self._act({"type": "pointer", "id": "mouse", **mouse})

    def _act(self, source: dict[str, Any]) -> None:
        self._send("POST", "/actions", {"actions": [source]})

    def resize(self, width: int, height: int) -> None:
        """Changes the window's size."""
        self._send("POST", "/window/rect", {"width": width, "height": height})

    def picture(self) -> np.ndarray:  # [h, w, 3] uint8
        """What the window shows."""
        data = base64.b64decode(self._send("GET", "/screenshot"))
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def settled(self) -> np.ndarray:  # [h, w, 3] uint8
        """What the window shows once it has stopped changing."""
        last = self.picture()
        for _ in range(100):
            time.sleep(0.3)
            now = self.picture()
            if np.array_equal(now, last):
                return now
            last = now
        raise AssertionError("the page never came to rest")

    def complaints(self) -> list[str]:
        """Warnings and errors of the page since the last call."""
        entries = self._send("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] in ("WARNING", "SEVERE")]
