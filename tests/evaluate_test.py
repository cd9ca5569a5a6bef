import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import toy
from experiments import report
from mmjax import evaluate, masking, plots, tables

SPLIT = toy.make_batch(10, seed=3)
PARAMS, EXTRA = toy.init(jax.random.key(0), toy.SPEC)
CONDITIONS = evaluate.parse_rates("0,0.5") + [evaluate.missing_condition("la")]


def predictions(split=SPLIT, conditions=CONDITIONS, seeds=(0, 1), **kwargs):
  grid = evaluate.make_grid(toy.make_system(), split, **kwargs)
  return np.asarray(grid(PARAMS, EXTRA, np.stack([c.rates for c in conditions]), list(seeds)))


@pytest.fixture(scope="module")
def expected():
  return predictions()


def test_complete_data_give_the_plain_predictions(expected):
  plain = toy.predict(PARAMS, SPLIT, EXTRA)["prediction"]
  np.testing.assert_allclose(expected[0], np.stack([plain, plain]), rtol=1e-5)
  assert expected.shape == (3, 2, 10)


def test_masks_depend_on_condition_seed_and_sample_alone(expected):
  assert (expected[1, 0] != expected[1, 1]).any()
  np.testing.assert_array_equal(expected[2, 0], expected[2, 1])  # nothing random is left
  np.testing.assert_allclose(predictions(batch_size=3), expected, rtol=1e-5)
  reversed_ = predictions(conditions=CONDITIONS[::-1], seeds=(1, 0))
  np.testing.assert_allclose(reversed_[::-1, ::-1], expected, rtol=1e-5)
  order = np.random.default_rng(0).permutation(10)
  shuffled = predictions(split=jax.tree.map(lambda a: a[order], SPLIT))
  np.testing.assert_allclose(shuffled, expected[:, :, order], rtol=1e-5)


def test_what_is_missing_cannot_change_a_prediction(expected):

  def poison(m, value):
    return m._replace(x=np.where(m.valid[..., None], np.float32(value), m.x))

  poisoned = SPLIT._replace(text=poison(SPLIT.text, np.nan), audio=poison(SPLIT.audio, 1e9))
  found = predictions(split=poisoned)
  np.testing.assert_array_equal(found[2], expected[2])
  assert np.isnan(found[0]).all()


def test_a_grid_is_traced_once():
  traces = []

  def mask_of(rates):
    traces.append(1)
    return masking.bernoulli(rates)

  grid = evaluate.make_grid(toy.make_system(), SPLIT, mask_of, batch_size=4)
  for rate in (0.1, 0.4):
    grid(PARAMS, EXTRA, jnp.full((2, 3, 2), rate), [0, 1])
  assert len(traces) == 1


def test_rows_carry_condition_seed_and_metrics(expected):
  rows = evaluate.robustness(toy.make_system(), PARAMS, EXTRA, SPLIT, toy.SPEC, CONDITIONS, [0, 1])
  assert [(r["condition"], r["mask_seed"]) for r in rows[:3]] == [("0", 0), ("0", 1), ("0.5", 0)]
  mae = np.abs(expected - SPLIT.label).mean(-1).ravel()
  np.testing.assert_allclose([r["mae"] for r in rows], mae, rtol=1e-5)
  validate = evaluate.make_validator(toy.make_system(), SPLIT, toy.SPEC, CONDITIONS[1], seed=1)
  np.testing.assert_allclose(validate(PARAMS, EXTRA)["mae"], mae[3], rtol=1e-5)


def test_conditions_are_parsed():
  assert [c.name for c in evaluate.parse_rates("0:0.9:0.1")] == [f"{n / 10:g}" for n in range(10)]
  (interval,) = evaluate.parse_rates("0.4-0.6")
  np.testing.assert_allclose(interval.rates, [[0.4, 0.6]] * 3)
  np.testing.assert_array_equal(evaluate.missing_condition("va").rates[:, 0], [0, 1, 1])
  for wrong in ("0.6-0.4", "1.5", "0:1:0"):
    with pytest.raises(ValueError, match="rate"):
      evaluate.parse_rates(wrong)
  with pytest.raises(ValueError, match="letters"):
    evaluate.missing_condition("t")


def test_methods_against_a_baseline(tmp_path, capsys):
  """Mask seeds are averaged within a run; deltas, Welch's p and the paper's values follow."""
  values = {"ORIG": [1.0, 1.2, 1.1], "M3S": [0.7, 0.9, 0.8]}
  rows = [
    {
      "missing_rate": "0.4-0.6",
      "method": method,
      "seed": seed,
      "mask_seed": mask_seed,
      "kind": "rate",
      "condition": condition,
      "mae": value + shift + (condition == "0.6-0.8"),
    }
    for condition in ("0.4-0.6", "0.5", "0.6-0.8")
    for method, runs in values.items()
    for seed, value in enumerate(runs)
    for mask_seed, shift in enumerate((-0.1, 0.1))
  ]
  paper = pd.DataFrame(
    [
      {
        "model": "Self-MM",
        "dataset": "SIMS",
        "input_rate": "0.4-0.6",
        "test_rate": "0.4-0.6",
        "method": "M3S",
        "metric": "mae",
        "value": 0.5053,
      }
    ]
  )
  table = report.comparison(rows, tmp_path, paper, model="self_mm", dataset="sims")
  orig, m3s, *shifted = table.to_dict("records")
  np.testing.assert_allclose([row["mean"] for row in shifted], [2.1, 1.8])
  assert [row["test_rate"] for row in shifted] == ["0.6-0.8"] * 2
  assert (orig["method"], m3s["method"], m3s["n"]) == ("ORIG", "M3S", 3)
  np.testing.assert_allclose([orig["mean"], m3s["mean"], m3s["delta"]], [1.1, 0.8, -0.3])
  np.testing.assert_allclose([orig["std"], m3s["std"]], [0.1, 0.1])
  t = 0.3 / np.sqrt(2 * 0.1**2 / 3)  # equal variances: 4 degrees of freedom
  np.testing.assert_allclose(m3s["p"], 2 * stats.t.sf(t, 4))
  assert np.isnan(orig["p"]) and m3s["paper"] == 0.5053 and np.isnan(orig["paper"])
  assert "0.8000 ± 0.1000" in (tmp_path / "comparison.md").read_text(encoding="utf-8")
  assert "toprule" in (tmp_path / "comparison.tex").read_text(encoding="utf-8")
  assert "M3S" in capsys.readouterr().out


def test_tables_and_curves(tmp_path):
  rows = [
    {"method": m, "condition": c, "mask_seed": s, "mae": base + s}
    for m, base in (("b", 1.0), ("a", 2.0))
    for c in ("0", "0.5")
    for s in (0, 1)
  ]
  table = tables.write(tmp_path, "t", rows, ("method", "condition"))
  assert list(table["method"]) == ["b", "b", "a", "a"]
  np.testing.assert_allclose(table["mae"], [1.5, 1.5, 2.5, 2.5])
  np.testing.assert_allclose(table["mae_std"], np.sqrt(0.5))
  assert "1.500 ± 0.707" in (tmp_path / "t.md").read_text(encoding="utf-8")
  assert pd.read_csv(tmp_path / "t_runs.csv")["mae"].tolist() == [row["mae"] for row in rows]
  path = plots.curves(
    table, ["mae"], tmp_path / "deep" / "t.png", x="condition", x_label="rate", lines="method"
  )
  assert path.read_bytes().startswith(b"\x89PNG")


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
