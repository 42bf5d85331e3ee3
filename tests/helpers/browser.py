"""A real browser, headless, by the WebDriver protocol: what a test opens, asks and looks at."""

import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Without these it calls its maker's servers at every start.
_QUIET = ("--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", "--disable-dev-shm-usage", *_QUIET)


def missing() -> str:
    """What is not installed; empty where a browser can be started."""
    lacking = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(lacking)} not installed: apt-get install chromium chromium-driver" if lacking else ""


class Browser:
    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, method=method)
        request.add_header("content-type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def open(self, url: str) -> None:
        self.ask("POST", "/url", {"url": url})

    def run(self, script: str) -> Any:
        """What a function with that body gives."""
        return self.ask("POST", "/execute/sync", {"script": script, "args": []})

    def until(self, script: str, limit_s: float = 30.0) -> Any:
        """What the script gives, as soon as that is true."""
        until_s = time.monotonic() + limit_s
        while not (found := self.run(script)):
            assert time.monotonic() < until_s, f"not in {limit_s:g} s: {script}"
            time.sleep(0.1)
        return found

    def log(self) -> list[str]:
        """What the page or the browser complained about."""
        return [line["message"] for line in self.ask("POST", "/se/log", {"type": "browser"})]

    def prefer(self, scheme: str) -> None:
        """Have pages be `light` or `dark`."""
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.ask("POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": media})

    def screenshot(self) -> bytes:
        return b64decode(self.ask("GET", "/screenshot"))


@contextmanager
def browsing(width: int = 1280, height: int = 1000, dark: bool = False) -> Iterator[Browser]:
    command = ["chromedriver", "--port=0"]
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver,
    ):
        try:
            port = next(line.split("port ")[-1].strip(". \n") for line in driver.stdout if "successfully on" in line)
            flags = [*_FLAGS, f"--user-data-dir={folder}", f"--window-size={width},{height}"]
            options = {"args": flags, "binary": shutil.which("chromium")}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            url = f"http://127.0.0.1:{port}/session"
            session = Browser(url).ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
            browser = Browser(f"{url}/{session}")
            try:
                browser.prefer("dark" if dark else "light")
                yield browser
            finally:
                browser.ask("DELETE", "")  # or the browser would outlive its driver
        finally:
            driver.terminate()
