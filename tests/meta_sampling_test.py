"""The study of meta-sampling: what costs as much, what is tuned, read once, tested in pairs."""

from types import SimpleNamespace

import jax
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import toy
from command import ROOT, call, refused
from experiments import build, child, loop, settings
from experiments.studies import lines, meta_sampling, search, why
from mmjax import data, meta, metrics, tables, train, types


def config_of(name="misa:mosi", **entries):
  config = settings.load(name)
  settings.assign_all(config, entries)
  return config


def test_learning_rates_are_multiplied_wherever_they_stand():
  before = config_of("self_mm:mosi")
  after = lines.changed(before, {"optimizer ×": 2.0, "method.optimizer ×": 10.0})
  assert after.optimizer.learning_rate == 2 * before.optimizer.learning_rate
  pairs = zip(after.optimizer.groups, before.optimizer.groups, strict=True)
  for (path, own), (same, old) in pairs:
    assert path == same and own["learning_rate"] == 2 * old["learning_rate"]
    assert own.get("weight_decay") == old.get("weight_decay")
  assert after.method.optimizer.learning_rate == 10 * before.method.optimizer.learning_rate
  mmin = lines.changed(config_of("mmin:iemocap"), {"optimizer ×": 3.0})
  assert mmin.optimizer.learning_rate.peak == pytest.approx(3e-4)
  assert lines.changed(before, {}).optimizer == before.optimizer


def test_what_costs_as_much_has_as_many_gradients_of_rows():
  """In more epochs, or in larger batches and as many steps; schedules last as long as training."""
  config = config_of("mmin:iemocap", **{"train.patience": 7})
  made = {line.name: line for line in lines.main(config, {"m3s": {"method.inner_steps": 3}})}
  m3s, epochs, batches = (
    made[name].config for name in ("M3S", "SPL-TRN, epochs × 4", "SPL-TRN, batches × 4")
  )
  assert made["M3S"].rivals == ("ORIG", "SPL-TRN", "SPL-TRN, epochs × 4", "SPL-TRN, batches × 4")
  rows, total = 5 * 1024, []
  for one in (m3s, epochs, batches):
    (phase,) = (p for p in build.make_system(one).phases if p.name == "student")
    steps = train.total_steps(phase, one.train.epochs, rows, one.train.batch_size)
    total.append(steps * lines.cost(one).equivalent)
  assert total == [total[0]] * 3
  assert (epochs.train.patience, epochs.model.teacher_epochs) == (28, 80)
  assert made["SPL-TRN"].config.train == config.train
  # a step with hard masks costs 1 + 4 / 3 gradients
  hard = config_of(**{"method.name": "spl", "method.hard_masks": 4, "train.epochs": 30})
  plain = config_of(**{"method.name": "spl", "train.epochs": 30})
  assert lines.matched("", plain, hard)[0].config.train.epochs == 70


@pytest.mark.parametrize("model", ["misa", "self_mm", "mmim", "mmin", "lnln"])
def test_every_variant_is_a_method_and_has_a_rival_that_costs_as_much(model):
  config = config_of(f"{model}:mosi")
  found = lines.variants(config, {"m3s": {"method.inner_steps": 5, "method.optimizer ×": 2.0}})
  costs = {
    line.name: lines.cost(line.config).equivalent * line.config.train.epochs for line in found
  }
  assert len(costs) == len(found) == 14 + len({c for n, c in costs.items() if " × " in n})
  for line in found:
    if line.rivals:
      assert line.rivals[0] == "SPL-TRN"
      assert costs[line.rivals[1]] == pytest.approx(costs[line.name], rel=0.02)
  by_name = {line.name: settings.plain(line.config.method) for line in found}
  assert by_name["M3S, K = 1"]["inner_steps"] == 1 and by_name["M3S, K = 5"]["inner_steps"] == 5
  assert by_name["M3S, lighter support"]["support_rate"] == (0.2, 0.3)
  tuned = {"m3s": {"method.inner_steps": 3, "optimizer ×": 2.0}, "spl": {"optimizer ×": 0.5}}
  tables = [{line.name: line.config for line in t(config, tuned)} for t in lines.TABLES.values()]
  for name in tables[0].keys() & tables[1].keys():  # their runs lie in one folder
    assert tables[0][name] == tables[1][name], name
  kept = [line.name for line in lines.some(found, ["M3S, K = 3"])]
  assert kept == ["SPL-TRN", "SPL-TRN, epochs × 4", "M3S, K = 3"]
  with pytest.raises(types.UsageError, match="no line 'K'"):
    lines.some(found, ["K"])


def test_every_method_draws_as_many_trials_the_first_of_which_changes_nothing():
  """In the others, the outer rates are the same for all methods."""
  outer = lambda method: [search.draw(method, n)["optimizer ×"] for n in range(1, 6)]  # noqa: E731
  assert outer("orig") == outer("spl") == outer("m3s")
  for method, space in search.SPACES.items():
    drawn = [search.draw(method, n) for n in range(6)]
    assert drawn[0] == {} and drawn == [search.draw(method, n) for n in range(6)]
    assert all(set(one) == set(space) for one in drawn[1:])
    factors = {one["optimizer ×"] for one in drawn[1:]}
    assert len(factors) == 5 and all(0.25 <= factor <= 4 for factor in factors)
    for one in drawn:
      build.make_method(lines.changed(config_of(), {"method.name": method, **one}))


def test_a_trial_costs_no_more_than_is_asked_for():
  cheap = [search.draw("m3s", n, lambda one: one["method.inner_steps"] == 1) for n in range(1, 9)]
  assert {one["method.inner_steps"] for one in cheap} == {1}
  with pytest.raises(types.UsageError, match="no setting of m3s .* --gradients"):
    search.draw("m3s", 1, lambda one: False)
  free = [search.draw("m3s", n) for n in range(1, 9)]
  assert {one["method.inner_steps"] for one in free} == {1, 3, 5}
  kept = [one for one in zip(cheap, free, strict=True) if one[1]["method.inner_steps"] == 1]
  assert kept and all(one == other for one, other in kept)


def test_trials_that_differ_in_numbers_are_one_program_which_one_of_them_cannot_spoil(
  folder, monkeypatch
):
  programs, alone, real = [], [], loop.execute_together

  def execute_together(runs, *args, **kwargs):
    programs.append(len(runs))
    real(runs, *args, **kwargs)

  class Here:
    """Trains in this process, at once."""

    count = 1

    def start(self, training):
      alone.append(training.path.parent.name)
      code, output = call("train", f"--workdir={training.path}")
      return SimpleNamespace(poll=lambda: child.Ended(code, output, output), stop=None, kill=None)

  monkeypatch.setattr(loop, "execute_together", execute_together)
  drawn = {"orig": {"optimizer ×": 1e30}, "spl": {"optimizer ×": 0.5}}
  monkeypatch.setattr(search, "SPACES", dict.fromkeys(drawn, {}))
  monkeypatch.setattr(search, "draw", lambda method, n, _: drawn[method] if n else {})
  config = settings.load(str(ROOT / "tests" / "toy_config.py"), "tiny")
  settings.assign_all(
    config, {"train.batch_size": 8, "train.epochs": 2, "method": {"name": "orig"}}
  )
  out = folder / "search"
  found = search.search(config, 2, folder / "data", out, Here(), "together")
  assert programs == [2, 2] and alone == ["orig-00", "orig-01"]
  assert found["orig"]["trial"] == 0 and found["spl"]["changes"] in ({}, drawn["spl"])
  scores = pd.read_csv(out / "trials.csv")["valid/mae"]
  assert scores.isna().tolist() == [False, True, False, False]


def test_the_test_split_is_read_once_unless_somebody_insists(tmp_path):
  meta_sampling.check_reading(tmp_path, "main", False)
  assert meta_sampling.note_reading(tmp_path, "main") == 1
  with pytest.raises(types.UsageError, match="was read for 'main' on 20.*--again"):
    meta_sampling.check_reading(tmp_path, "main", False)
  meta_sampling.check_reading(tmp_path, "variants", False)
  meta_sampling.check_reading(tmp_path, "main", True)
  assert meta_sampling.note_reading(tmp_path, "main") == 2


def test_paired_comparisons_are_those_of_the_differences():
  random = np.random.default_rng(0)
  values = {"a": random.normal(size=6), "b": random.normal(size=6), "c": np.ones(6)}
  rows = [
    {"method": name, "condition": "0.5", "seed": seed, "mask_seed": mask, "mae": value + mask}
    for name, one in values.items()
    for seed, value in reversed(list(enumerate(one)))
    for mask in (-1, 1)
  ]
  table = tables.paired(rows, [("a", "b"), ("a", "c"), ("c", "c"), ("a", "no")], by="method")
  assert table["rival"].tolist() == ["b", "c", "c"] and table["n"].tolist() == [6] * 3
  for row, rival in zip(table.itertuples(), ("b", "c"), strict=False):
    test = stats.ttest_rel(values["a"], values[rival])
    interval = test.confidence_interval()
    np.testing.assert_allclose(
      (row.p, row.low, row.high), (test.pvalue, interval.low, interval.high), rtol=1e-9
    )
    d = values["a"] - values[rival]
    np.testing.assert_allclose(row.effect, d.mean() / d.std(ddof=1))
    # the interval of an effect: as large an effect, seen from its ends, has p = 2.5 %
    t = row.effect * 6**0.5
    ends = (
      stats.nct.sf(t, 5, row.effect_low * 6**0.5),
      stats.nct.cdf(t, 5, row.effect_high * 6**0.5),
    )
    np.testing.assert_allclose(ends, 0.025, rtol=1e-2)
  assert table["p_holm"].tolist()[:2] == tables.holm(table["p"][:2].tolist())
  assert table.iloc[2][["effect", "p", "p_holm"]].isna().all() and table.iloc[2]["delta"] == 0


def test_why_measures_the_inner_step_on_a_quadratic():
  """0.5 |θ - y|²: of the support's gradient g, θ* = θ - α g and the query's g - α g."""

  def loss(params, batch, key, extra):
    del key
    return 0.5 * ((params["a"] - batch.label.mean()) ** 2).sum(), types.Aux({}, extra)

  system = types.System(
    lambda key, spec: ({"a": np.ones(2)}, {}), toy.predict, (types.Phase("m", loss),)
  )
  batch = toy.make_batch(32)._replace(label=np.full(32, 4.0, np.float32))
  dataset = data.Dataset(batch, batch, batch, toy.SPEC, {}, "toy")
  config = config_of(**{"method.optimizer.learning_rate": 0.1, "method.inner_steps": 1})
  recipe = train.Recipe(system, meta.METHODS["orig"](lambda key, batch: batch), {}, 8)
  run = build.Run(config, dataset, recipe, {}, jax.random.key(0))
  found = why.make_measure(run, config, draws=2)({"a": np.float32([1.0, 2.0])}, {})
  expected = {
    "cosine support, query": 1,
    "distance": 0.1 * np.sqrt(13),
    "relative distance": 0.1 * np.sqrt(13 / 5),
    "cosine at θ*, at θ": 1,
    "relative change": 0.1,
    "bias": 0.1,
    "noise": 0,
  }
  assert list(found) == list(why.NAMES)
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-3, err_msg=name)


def test_a_table_is_trained_and_tested_once(folder):
  toy_config = ROOT / "tests" / "toy_config.py"
  flags = (
    f"--config={toy_config}:tiny",
    *("--config.train.batch_size=8", "--config.train.epochs=2", "--line=SPL-TRN", "--trials=0"),
    *("--seeds=2", "--mask_seeds=1", "--schedule=together", "--curve=0.5", "--timed_steps=0"),
    f"--data_dir={folder / 'data'}",
    f"--out={folder / 'study'}",
  )
  code, output = call("studies.meta_sampling", *flags)
  assert code == 0 and "the test split was not read" in output, output
  assert not (folder / "study" / "test_read.json").exists()
  assert set(pd.read_csv(folder / "study" / "main_valid.csv")["method"]) == {"ORIG", "SPL-TRN"}
  cost = pd.read_csv(folder / "study" / "main_cost.csv")
  assert (cost["steps"] == 16).all() and (cost["gradients"] == 16).all()
  code, output = call("studies.meta_sampling", *flags, "--test")
  assert code == 0, output
  rows = pd.read_csv(folder / "study" / "main_runs.csv")
  assert len(rows) == 2 * 2 * 6 and set(rows["split"]) == {"test"}
  paired = pd.read_csv(folder / "study" / "main_paired.csv")
  mae = paired[paired["metric"] == "mae"]
  assert mae["condition"].tolist() == ["0.4-0.6", "0", "0.2-0.4", "0.6-0.8", "0.8-1"]
  assert metrics.METRICS["mae"].title in output and (folder / "study" / "main.png").exists()
  assert "--again" in refused("studies.meta_sampling", *flags, "--test")
