"""Calls of the experiment binaries, in this process or in one of their own."""

import contextlib
import importlib
import io
import pathlib
import subprocess
import sys

import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).parents[1]


def call(binary, *argv):
  """Runs `experiments.BINARY` here: its exit code and what it printed, errors last."""
  output, code = io.StringIO(), 0
  module = importlib.import_module(f"experiments.{binary}")
  with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
    try:
      module.main(list(argv))
    except SystemExit as end:
      code = end.code
  if isinstance(code, str):
    print(code, file=output)
    code = 1
  return code or 0, output.getvalue()


def start(binary, *argv, **kwargs):
  """`python -m experiments.BINARY` as a process, its output and errors in one pipe."""
  command = [sys.executable, "-m", f"experiments.{binary}", *argv]
  return subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
  )


def refused(binary, *argv):
  """The one line with which a binary refuses its flags."""
  code, output = call(binary, *argv)
  line = output.splitlines()[-1]
  assert code == 1 and line.startswith("error: ") and "Traceback" not in output, output
  return line


def final(path):
  """Everything in the newest checkpoint of a run."""
  with ocp.CheckpointManager(path / "checkpoints") as checkpoints:
    return checkpoints.restore(checkpoints.latest_step(), args=ocp.args.StandardRestore())
