"""Chromium without a window, told what to do over its debugging pipe: one page, looked at like a user does."""

import base64
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECONDS = 120.0  # for one answer, or for what a page must show


class Browser:
    """folder: for the profile. width, height: of the page, in pixels."""

    def __init__(self, folder: Path, width: int, height: int):
        (commands, self._to), (self._from, answers) = os.pipe(), os.pipe()
        # Chromium reads its file 3 and writes its file 4, so none of these may be in the way.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (commands, answers)]
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--remote-debugging-pipe", f"--user-data-dir={folder}/profile", "about:blank"]
        self._process = subprocess.Popen(
            command,
            env=os.environ | {"HOME": str(folder)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: [os.dup2(end, number) for end, number in zip(ends, (3, 4), strict=True)],
            close_fds=False,
        )
        for end in (commands, answers, *ends):
            os.close(end)
        self._number, self._read, self._session = 0, b"", {}
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def ask(self, method: str, **params) -> dict:
        """A command of the DevTools protocol and its result; events in between are passed over."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params} | self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + SECONDS
        while True:
            while b"\0" not in self._read:
                assert select.select([self._from], [], [], max(0.0, end - time.monotonic()))[0], f"{method}: no answer"
                self._read += os.read(self._from, 1 << 20)
            one, _, self._read = self._read.partition(b"\0")
            answer = json.loads(one)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, url: str) -> None:
        self.ask("Page.navigate", url="about:blank")  # another fragment of the same address is no new page
        self.ask("Page.navigate", url=url)

    def value(self, expression: str):
        """What the JavaScript expression comes to, as JSON has it."""
        told = self.ask("Runtime.evaluate", expression=f"JSON.stringify({expression})", returnByValue=True)
        return json.loads(told["result"].get("value", "null"))

    def wait(self, expression: str):
        """The expression's value, once it is true of the page."""
        end = time.monotonic() + SECONDS
        while not (value := self.value(expression)):
            seen = self.value("document.body.innerText")
            assert time.monotonic() < end, f"{expression} is not true of the page:\n{seen}"
            time.sleep(0.5)
        return value

    def pixels(self) -> np.ndarray:
        """The page as it is seen, (height, width, 3) uint8."""
        png = base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._to)
        os.close(self._from)
