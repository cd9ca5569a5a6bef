"""The notebooks, on a small setting and without TensorFlow."""

import json
import re
import sys

import pytest

from command import ROOT

# Rows of the last table of each: what was compared × conditions.
ROWS = {
  "meta_sampling": 6 * 5 + 3 * 6,
  "own_loss": 3 * 3,
  "quickstart": 3 * 4,
  "robustness_of_your_model": 2 * 10,
  "tpu": 4,
}


def cells(name):
  notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
  return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_notebooks_are_kept_clean_and_install_themselves():
  assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == sorted(ROWS)
  for name in ROWS:
    first, *others = ("".join(cell["source"]) for cell in cells(name))
    assert "REPOSITORY = " in first and "device_kind" in others[0], name
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells(name))
    paths = re.findall(r'["\'](/[^"\']*)', "".join([first, *others]))
    assert all(path.startswith(("/content", "/dev/accel")) for path in paths), paths


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_a_notebook_runs(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("MMJAX_SMALL", "1")
  monkeypatch.setitem(sys.modules, "tensorflow", None)
  space = {"__name__": "__main__"}
  for number, cell in enumerate(cells(name)):
    exec(compile("".join(cell["source"]), f"{name}.ipynb cell {number}", "exec"), space)
  table = space["table"]
  assert len(table) == ROWS[name] and table["mae"].notna().all()
  for path in tmp_path.glob("*.png"):
    assert path.stat().st_size > 5000
