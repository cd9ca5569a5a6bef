"""The wheel in a fresh environment, outside of the repository and without TensorFlow."""

import os
import re
import shutil
import site
import subprocess
import sys
import zipfile

import pytest

from command import ROOT
from mmjax import synthetic

SOURCES = (
  "mmjax",
  "experiments",
  "data_prep",
  "setup.py",
  "pyproject.toml",
  "README.md",
  "LICENSE",
)


# In sight of the repository's mmjax.egg-info, pip would take the wheel for installed.
ELSEWHERE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command, **kwargs):
  done = subprocess.run(command, capture_output=True, text=True, **kwargs)
  assert done.returncode == 0, (command, done.stdout, done.stderr)
  return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """A wheel of a copy, for builds leave files beside the sources."""
  folder = tmp_path_factory.mktemp("wheel")
  for name in SOURCES:
    if (ROOT / name).is_dir():
      shutil.copytree(ROOT / name, folder / "source" / name)
    else:
      shutil.copy(ROOT / name, folder / "source" / name)
  pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
  run(*pip, "wheel", "--no-deps", f"--wheel-dir={folder}", folder / "source")
  (found,) = folder.glob("mmjax-*.whl")
  return found


@pytest.fixture(scope="module")
def binaries(wheel, tmp_path_factory):
  """The commands of an environment with the wheel and what it needs, but TensorFlow."""
  folder = tmp_path_factory.mktemp("environment")
  run(sys.executable, "-m", "venv", "--without-pip", folder)
  python = folder / "bin" / "python"
  pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", f"--python={python}")
  run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder, env=ELSEWHERE)
  (packages,) = folder.glob("lib/python*/site-packages")
  # the packages of this environment, but not what is installed there as editable
  lines = [*site.getsitepackages(), "import sys; sys.modules['tensorflow'] = None"]
  (packages / "here.pth").write_text("\n".join(lines) + "\n")
  return folder / "bin"


def test_imports_follow_the_name_that_a_folder_is_installed_under():
  for folder in ("experiments", "data_prep"):
    for path in (ROOT / folder).rglob("*.py"):
      if "benchmarks" not in path.parts:
        found = re.findall(
          r"^ *(?:from|import) (?:experiments|data_prep)\b.*", path.read_text(), re.M
        )
        assert not found, (path, found)


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_no_other_names(wheel):
  with zipfile.ZipFile(wheel) as file:
    names = file.namelist()
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    needs = [line for line in file.read(metadata).decode().splitlines() if "Requires-Dist" in line]
  assert {name.split("/")[0].partition("-")[0] for name in names} == {"mmjax"}
  for path in ("report/paper_lnln.csv", "report/paper_m3s.csv", "configs/misa.py", "spaces/m3s.py"):
    assert f"mmjax/experiments/{path}" in names
  assert "mmjax/py.typed" in names
  assert not [name for name in names if "/benchmarks/" in name or "/results/" in name]
  assert {"tensorflow" in need for need in needs if "extra ==" not in need} == {False}
  assert any("tensorflow-cpu" in need for need in needs)


@pytest.mark.slow
def test_a_study_and_its_trainings_run_from_the_wheel(binaries, tmp_path):
  arrays = synthetic.make_arrays(seed=1, num_train=64, num_valid=24, num_test=24)
  synthetic.write_pickle(tmp_path / "data" / "mosi.pkl", arrays)
  (tmp_path / "own.py").write_text("from mmjax.models.misa import make\n")  # found where one is
  settings = ("--set=train.epochs=1", "--set=train.batch_size=32", "--set=model.name=own:make")
  output = run(
    *(binaries / "mmjax-compare", "--config=misa:mosi", *settings, "--set=model.hidden_size=4"),
    *("--methods=orig", "--seeds=1", "--out=out", "--missing_rate=0.5", "--test_rate=0.5"),
    cwd=tmp_path,
    env=ELSEWHERE,
  )
  assert "ORIG" in output and (tmp_path / "out" / "comparison.csv").exists()
  text = run(binaries / "mmjax-train", "--config=misa:mosi", "--help", cwd=tmp_path, env=ELSEWHERE)
  assert "mmjax-train --config=misa:mosi" in text and "python -m" not in text
  assert "model.hidden_size" in text
