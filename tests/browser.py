"""Headless Chromium over its debugging pipe: what a page does, loads and complains about."""

import base64
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find() -> str | None:
  """The browser's command, if there is one."""
  return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
  """One page at a time.

  Attributes:
    requests: addresses of all that was asked for.
    complaints: the console's errors and warnings, and uncaught exceptions.
  """

  def __init__(self, command: str):
    self.requests: list[str] = []
    self.complaints: list[str] = []
    self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    there, self._send = os.pipe()
    self._receive, back = os.pipe()
    # Chromium reads commands from descriptor 3 and writes answers to 4; no number is in the way
    given = [fcntl.fcntl(number, fcntl.F_DUPFD, 10) for number in (there, back)]
    self._process = subprocess.Popen(
      ["bash", "-c", f'exec "$@" 3<&{given[0]} 4>&{given[1]}', "bash", command, *self._flags()],
      pass_fds=given,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    for number in (there, back, *given):
      os.close(number)
    self._number, self._rest, self._session = 0, b"", None

  def _flags(self) -> list[str]:
    own = f"--user-data-dir={self._folder.name}"
    quiet = ("--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
    return ["--headless", "--no-sandbox", "--remote-debugging-pipe", own, *quiet]  # root's

  def __enter__(self):
    try:
      target = self._call("Target.createTarget", url="about:blank")["targetId"]
      attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
      self._session = attached["sessionId"]
      for domain in ("Page", "Network", "Log", "Runtime"):
        self._call(f"{domain}.enable")
    except BaseException:
      self.__exit__()
      raise
    return self

  def __exit__(self, *_):
    self._process.kill()
    self._process.wait()
    os.close(self._send)
    os.close(self._receive)
    self._folder.cleanup()

  def _call(self, method: str, **params) -> dict[str, Any]:
    self._number += 1
    message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
    if self._session:
      message["sessionId"] = self._session
    os.write(self._send, json.dumps(message).encode() + b"\0")
    while (found := self._read()).get("id") != self._number:
      self._note(found)
    if "error" in found:
      raise RuntimeError(f"{method}: {found['error']}")
    return found["result"]

  def _read(self) -> dict[str, Any]:
    while b"\0" not in self._rest:
      part = os.read(self._receive, 1 << 16)
      if not part:
        raise RuntimeError("the browser has ended")
      self._rest += part
    message, _, self._rest = self._rest.partition(b"\0")
    return json.loads(message)

  def _note(self, event: dict[str, Any]) -> None:
    method, params = event.get("method"), event.get("params", {})
    if method == "Network.requestWillBeSent":
      self.requests.append(params["request"]["url"])
    elif method == "Runtime.exceptionThrown":
      self.complaints.append(str(params["exceptionDetails"]))
    elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
      self.complaints.append(params["entry"]["text"])
    elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
      self.complaints.append(str(params["args"]))

  def open(
    self, path: pathlib.Path, *, width: int = 1280, dark: bool = False, media: str = "screen"
  ) -> None:
    """Opens a file in a window of some width, or on paper, on a machine set to dark or not."""
    size = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
    self._call("Emulation.setDeviceMetricsOverride", **size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    self._call("Emulation.setEmulatedMedia", media=media, features=[scheme])
    self._call("Page.navigate", url=path.resolve().as_uri())
    self.wait(
      "document.readyState === 'complete' && !document.querySelector('.chart:not([data-drawn])')"
    )

  def wait(self, condition: str, seconds: float = 10.0) -> None:
    """Until an expression is true in the page."""
    end = time.monotonic() + seconds
    while not self.run(f"Boolean({condition})"):
      if time.monotonic() > end:
        raise TimeoutError(condition)
      time.sleep(0.02)

  def run(self, script: str) -> Any:
    """What an expression, perhaps a promise, gives in the page."""
    asked = dict(expression=script, awaitPromise=True, returnByValue=True)
    found = self._call("Runtime.evaluate", **asked)
    if "exceptionDetails" in found:
      raise RuntimeError(str(found["exceptionDetails"]))
    return found["result"].get("value")

  def point(self, x: float, y: float) -> None:
    """Moves the pointer."""
    self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

  def picture(self, path: pathlib.Path, *, whole: bool = False) -> None:
    """Saves what is seen, or the whole page, as PNG."""
    shot = self._call("Page.captureScreenshot", captureBeyondViewport=whole, **self._clip(whole))
    path.write_bytes(base64.b64decode(shot["data"]))

  def _clip(self, whole: bool) -> dict[str, Any]:
    if not whole:
      return {}
    size = self._call("Page.getLayoutMetrics")["cssContentSize"]
    return {"clip": {"x": 0, "y": 0, **{k: size[k] for k in ("width", "height")}, "scale": 1}}
