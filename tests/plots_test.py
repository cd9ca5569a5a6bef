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


def test_the_looks_of_24_systems_share_no_two_parts_and_the_legend_covers_no_data(monkeypatch):
  looks = [plots.style(number) for number in range(24)]
  for pair in (("color", "marker"), ("color", "dash"), ("marker", "dash"), ("color", "shape")):
    assert len({tuple(getattr(look, part) for part in pair) for look in looks}) == 24, pair
  monkeypatch.setattr(plots, "_save", lambda drawn, path: drawn)
  rows = [
    {"model": f"system {n}", "at": at, "mae": n + float(at), "corr": 0.1, "mask_seed": seed}
    for n in range(24)
    for at in ("0", "0.5")
    for seed in (0, 1)
  ]
  table = tables.summarize(rows, ("model", "at"))
  for draw in (plots.curves, plots.dots):
    drawn = draw(table, ["mae", "corr"], "", x="at", x_label="rate", lines="model")
    drawn.draw_without_rendering()
    (legend,) = drawn.legends
    assert len(legend.texts) == 24
    box = legend.get_window_extent()
    assert drawn.bbox.x0 <= box.x0 and box.x1 <= drawn.bbox.x1 and drawn.bbox.y0 <= box.y0
    for panel in drawn.axes:
      assert panel.get_legend() is None and not panel.get_tightbbox().overlaps(box)
      lines = [line for line in panel.lines if len(line.get_xdata()) > 1 or draw is plots.dots]
      assert len({(line.get_color(), line.get_marker()) for line in lines}) == 24


def test_metrics_have_titles_and_strangers_their_names():
  assert plots.title("mae") == "MAE (lower is better)"
  assert plots.title("f1_2") == "F1 of class 2" and plots.title("train_loss") == "train loss"


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
  drawn = path.read_text()
  for text in ("left", "right", "no", "yes", "label", "predicted", "0", "1"):
    assert f"<!-- {text} -->" in drawn, text
