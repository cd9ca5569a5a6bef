"""Signals that ask a training to stop: told at once, whatever the program is busy with."""

import os
import signal
import sys
import threading
from collections.abc import Callable

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
  """A signal asked for the stop; what was reached is saved."""


class Watch:
  """`with Watch() as watch:` notes SIGINT and SIGTERM in `watch.signal` (None before one came).

  The first one says that the stop comes after this stretch of work, the second aborts. Python
  runs its own handlers only between two of its instructions, which compiling can hold up for a
  minute: a thread reads the signals' numbers from a pipe that the interpreter writes at once.
  """

  def __init__(self, told: str = "Stopping after this stretch of steps"):
    self.signal: int | None = None
    self.on_abort: Callable[[], object] = lambda: None
    self._told = told

  def __enter__(self) -> "Watch":
    self._read, self._write = os.pipe()
    os.set_blocking(self._write, False)
    self._old = {number: signal.signal(number, lambda *_: None) for number in NUMBERS}
    self._fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
    threading.Thread(target=self._listen, daemon=True).start()
    return self

  def __exit__(self, *_) -> None:
    signal.set_wakeup_fd(self._fd)
    for number, handler in self._old.items():
      signal.signal(number, handler)
    os.close(self._write)  # which ends the thread

  def _listen(self) -> None:
    with os.fdopen(self._read, "rb", buffering=0) as pipe:
      while byte := pipe.read(1):
        if byte[0] not in NUMBERS:
          continue
        if self.signal is not None:
          self.on_abort()
          print("Aborted.", file=sys.stderr, flush=True)
          os._exit(128 + byte[0])
        self.signal = byte[0]
        print(f"{self._told}; once more to abort at once.", file=sys.stderr, flush=True)
