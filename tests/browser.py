"""A page in headless Chromium, driven by its debugging protocol (https://chromedevtools.github.io/devtools-protocol)."""

import asyncio
import base64
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium")
"""The program; None if it is not installed (tests/install_chromium.sh)."""


class Page:
    """One open page."""

    def __init__(self, line: aiohttp.ClientWebSocketResponse) -> None:
        self._line = line
        self._number = 0
        self.errors: list[str] = []
        """Uncaught exceptions and console errors of the page."""

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol."""
        self._number += 1
        await self._line.send_json({"id": self._number, "method": method, "params": params})
        while True:
            news = json.loads((await asyncio.wait_for(self._line.receive(), 60)).data)
            if news.get("id") == self._number:
                assert "error" not in news, news["error"]
                return news["result"]
            if news.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(news["params"]["exceptionDetails"]))

    async def evaluate(self, script: str) -> Any:
        """The value of an expression; promises are awaited."""
        found = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def wait_for(self, condition: str, *, seconds: float = 60) -> None:
        """Until an expression is true."""
        for _ in range(int(seconds / 0.05)):
            if await self.evaluate(f"Boolean({condition})"):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"not true within {seconds} s: {condition}; page errors: {self.errors}")

    async def look(self, *, width: int, height: int, dark: bool = False) -> None:
        """Size of the window, and the colours that the reader prefers."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        colours = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[colours])

    async def screenshot(self, path: Path) -> None:
        """A PNG of the window."""
        path.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot"))["data"]))


@asynccontextmanager
async def open_page(url: str) -> AsyncIterator[Page]:
    """Chromium with a fresh profile at an address; it can reach no other host."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={profile}",
            "--remote-debugging-port=0", url, stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert process.stderr is not None
            while b"DevTools listening on" not in (line := await asyncio.wait_for(process.stderr.readline(), 60)):
                assert line, "Chromium ended"
            address = line.decode().split("ws://")[1].split("/")[0]
            async with aiohttp.ClientSession() as http:
                target = None
                for _ in range(600):
                    async with http.get(f"http://{address}/json") as answer:
                        pages = [entry for entry in await answer.json() if entry["type"] == "page"]
                    if pages:
                        target = pages[0]["webSocketDebuggerUrl"]
                        break
                    await asyncio.sleep(0.05)
                assert target is not None, "Chromium opened no page"
                async with http.ws_connect(target, max_msg_size=0) as line_:
                    page = Page(line_)
                    await page.call("Runtime.enable")
                    await page.call("Page.enable")
                    for _ in range(600):  # the address replaces an empty page; between the two there is no page
                        try:
                            if await page.evaluate(
                                "document.readyState == 'complete' && location.href != 'about:blank'"
                            ):
                                break
                        except AssertionError:
                            pass
                        await asyncio.sleep(0.05)
                    yield page
        finally:
            process.kill()
            await process.wait()
