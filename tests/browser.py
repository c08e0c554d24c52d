"""A real headless Chromium over the WebDriver protocol, as far as the tests of a page need it."""

from __future__ import annotations

import base64
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from icmoe.processes import free_port

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
ABSENT = "needs a headless Chromium: apt-get install chromium chromium-driver"
ANSWER_S = 60.0
TAB, ENTER = "\ue004", "\ue007"


@dataclass
class Browser:
    """One window."""

    http: httpx.Client
    session: str

    def ask(self, method: str, path: str, **values: Any) -> Any:
        body = values if method == "POST" else None
        answer = self.http.request(method, f"/session/{self.session}{path}", json=body).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def open(self, url: str) -> None:
        self.ask("POST", "/url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.ask("POST", "/execute/sync", script=script, args=list(arguments))

    def press(self, *keys: str) -> None:
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.ask("POST", "/actions", actions=[{"type": "key", "id": "keys", "actions": strokes}])

    def developer(self, command: str, **parameters: Any) -> Any:
        return self.ask("POST", "/goog/cdp/execute", cmd=command, params=parameters)

    def resize(self, width_px: int, height_px: int = 900, *, scheme: str = "light", mobile: bool = False) -> None:
        """The viewport itself: a window of Chromium is never narrower than 500 px."""
        size = {"width": width_px, "height": height_px, "deviceScaleFactor": 1, "mobile": mobile}
        self.developer("Emulation.setDeviceMetricsOverride", **size)
        self.developer("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, path: Path) -> None:
        """The whole page, however long."""
        shot = self.developer("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list[str]:
        """What the console was told since it was last asked: errors of scripts, of loading, of the page's policy."""
        return [entry["message"] for entry in self.ask("POST", "/se/log", type="browser") if entry["level"] != "DEBUG"]

    def wait(self, script: str, what: str, *, seconds: float = 30.0) -> Any:
        """The value of an expression once it is neither false nor null."""
        return until(lambda: self.run(f"return {script}"), what, seconds)


def until(look: Callable[[], Any], what: str, seconds: float) -> Any:
    ends = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < ends, f"waited {seconds:g} s for {what}"
        time.sleep(0.1)
    return found


@contextmanager
def browsing(folder: Path, *, script: bool = True) -> Iterator[Browser]:
    """A browser with a profile of its own below `folder`; `script` as people switch it off in its settings."""
    port = free_port()
    words = [str(DRIVER), f"--port={port}", "--allowed-ips=", f"--log-path={folder / 'chromedriver.log'}"]
    driver = subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=ANSWER_S, trust_env=False) as http:
            until(lambda: _answers(http), "chromedriver", 30.0)
            browser = Browser(http, _session(http, folder, script=script))
            yield browser
            http.delete(f"/session/{browser.session}")
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait(timeout=20)


def _answers(http: httpx.Client) -> bool:
    try:
        return bool(http.get("/status").json()["value"]["ready"])
    except httpx.HTTPError:
        return False


def _session(http: httpx.Client, folder: Path, *, script: bool) -> str:
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--ignore-certificate-errors"]
    words += [f"--user-data-dir={folder / 'profile'}", "--no-first-run", "--disable-background-networking", "--no-proxy-server"]
    options: dict[str, Any] = {"binary": CHROMIUM, "args": words}
    if not script:
        options["prefs"] = {"profile.managed_default_content_settings.javascript": 2}
    wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
    answer = http.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
    assert "sessionId" in answer, answer
    return str(answer["sessionId"])
