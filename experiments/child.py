"""One training in a process of its own, which ends with the process that started it."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
from typing import NamedTuple


class Ended(NamedTuple):
  """How a training ended.

  Attributes:
    code: its exit code; negative: the signal that killed it.
    output, errors: what it printed.
  """

  code: int
  output: str
  errors: str


class Child:
  """`python -m experiments.train --workdir=FOLDER`, under the name that this package has.

  Args:
    path: the run's folder.
    core: the one that it may use; None for any.
  """

  def __init__(self, path: str | pathlib.Path, core: int | None = None):
    # files, so that it never waits for a reader
    self._files = contextlib.ExitStack()
    output, errors = (
      self._files.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))  # noqa: SIM115
      for _ in range(2)
    )
    self._texts = (output, errors)
    read, self._write = os.pipe()
    module = f"{__package__}.train"
    command = [sys.executable, "-m", module, f"--workdir={path}", f"--parent={read}"]
    # a session of its own: a Ctrl-C reaches it through us, once
    self._process = subprocess.Popen(
      command, stdout=output, stderr=errors, text=True, start_new_session=True, pass_fds=(read,)
    )
    os.close(read)
    if core is not None:  # before it starts any thread
      os.sched_setaffinity(self._process.pid, {core})

  def poll(self) -> Ended | None:
    """How it ended; None while it runs. Not to be called once more then."""
    code = self._process.poll()
    if code is None:
      return None
    texts = []
    for file in self._texts:
      file.seek(0)
      texts.append(file.read())
    self._files.close()
    os.close(self._write)
    return Ended(code, *texts)

  def runs(self) -> bool:
    """Whether it runs still."""
    return self._process.poll() is None

  def stop(self) -> None:
    """Asks it to save and end."""
    self._process.send_signal(signal.SIGTERM)

  def kill(self) -> None:
    """Ends it at once."""
    self._process.kill()


def end_with(pipe: int) -> None:
  """Ends this process at once when nobody holds the other end of a pipe any more."""

  def wait():
    os.read(pipe, 1)
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()
