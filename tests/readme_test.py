import re
import shlex
import subprocess
import sys

import numpy as np

from command import ROOT, call

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_examples_run():
  space = {}
  for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
    exec(compile(block, "README.md", "exec"), space)
  assert np.isfinite(float(space["value"]))
  assert float(np.abs(space["gradient"]["w"]).max()) > 0


def test_named_files_and_modules_exist():
  for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
    assert (ROOT / path).exists(), path
  for module in re.findall(r"python -m (\S+)", README):
    path = ROOT / module.replace(".", "/")
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_the_commands_have_their_flags_and_configs():
  commands = re.findall(r"python -m experiments\.(\w+) ((?:[^\n`]*\\\n)*[^\n`]*)", README)
  known = [(name, flags) for name, flags in commands if name != "parity"]
  assert len(known) >= 5
  for name, flags in known:
    code, output = call(name, *shlex.split(flags.replace("\\\n", " ")), "--help")
    assert code == 0, (name, output)


def test_importing_the_library_loads_no_heavy_framework():
  code = (
    "import sys, mmjax, mmjax.data, mmjax.train, mmjax.evaluate, mmjax.plots, mmjax.models;"
    "print([m for m in ('tensorflow', 'torch', 'matplotlib') if m in sys.modules])"
  )
  found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
  assert found.stdout.strip() == "[]", found
