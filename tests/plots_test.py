"""Results -> figures, read back as what is drawn."""

import numpy as np
import pandas as pd

from mmjax import plots, tables


def test_curves_have_a_panel_for_each_metric_and_a_line_for_each_method(tmp_path):
  rows = [
    {"method": m, "condition": c, "mask_seed": s, "mae": base + s, "own": s}
    for m, base in (("b", 1.0), ("a", 2.0))
    for c in ("0", "0.5")
    for s in (0, 1)
  ]
  table = tables.summarize(rows, ("method", "condition"))
  path = tmp_path / "deep" / "t.svg"
  settings = dict(x="condition", x_label="rate", lines="method")
  assert plots.curves(table, ["mae", "own"], path, **settings) == path
  drawn = path.read_text()
  for text in ("MAE (lower is better)", "own", "rate", "a", "b"):
    assert f"<!-- {text} -->" in drawn, text
  path = plots.curves(table, ["mae"], tmp_path / "t.png", **settings)
  assert path.read_bytes().startswith(b"\x89PNG")


def test_metrics_have_titles_and_strangers_their_names():
  assert plots.title("mae") == "MAE (lower is better)"
  assert plots.title("f1_2") == "F1 of class 2" and plots.title("train_loss") == "train_loss"


def test_lines_have_a_panel_for_each_value(tmp_path):
  table = pd.DataFrame(
    {
      "against": ["K", "K", "B", "B"],
      "value": [1, 2, 8, 16],
      "ms": [1.0, 2.0, 3.0, 4.0],
      "order": ["first", "second"] * 2,
    }
  )
  path = plots.lines(
    table, "ms", tmp_path / "growth.svg", panels="against", x="value", lines="order"
  )
  drawn = path.read_text()
  assert all(f"<!-- {text} -->" in drawn for text in ("K", "B", "first", "second"))


def test_clouds_and_matrices_have_a_panel_for_each_name(tmp_path):
  points = {"a": np.zeros((3, 2)), "b": np.ones((3, 2))}
  drawn = plots.scatter({"one": points, "two": points}, tmp_path / "s.svg").read_text()
  assert all(f"<!-- {text} -->" in drawn for text in ("one", "two", "a", "b"))
  counts = {"left": np.eye(2, dtype=int), "right": np.zeros((2, 2), int)}
  path = plots.matrices(counts, ["no", "yes"], tmp_path / "m.svg", columns=2)
  assert all(f"<!-- {text} -->" in path.read_text() for text in ("left", "right", "no", "yes"))
