"""The report of a robust evaluation, from made-up results."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import browser
from experiments import protocols
from experiments.configs import lnln
from experiments.report import (
  averages,
  constant,
  markup,
  methods,
  page,
  papers,
  predictions,
  summary,
)
from mmjax import data, metrics, synthetic, tables, types

SPEC = types.Spec(*[types.ModalitySpec(2, 2)] * 3, num_train=4)
LNLN = papers.FOLDER / "paper_lnln.csv"
LABEL = np.float32([-2.6, -1.0, 0.2, 1.4, 2.9, 0.0])


def make_rows():
  """MAE grows linearly with the rate, by another slope for each model."""
  return [
    {
      "model": model,
      "split": "test",
      "selection": "valid/mae at rate 0.5",
      "kind": kind,
      "condition": condition,
      "seed": seed,
      "mask_seed": mask_seed,
      "mae": base + slope * (0.5 if kind == "missing" else float(condition)) + 0.1 * seed,
      "acc7": 0.3 + 0.01 * seed + 0.001 * mask_seed,
    }
    for model, base, slope in (("lnln", 1.0, 0.4), ("self_mm", 1.2, 0.2))
    for kind, condition in (("rate", "0"), ("rate", "0.5"), ("rate", "0.9"), ("missing", "la"))
    for seed in (0, 1)
    for mask_seed in (0, 1)
  ]


def test_the_area_is_a_mean_over_the_rates():
  table = pd.DataFrame(make_rows())
  table = table[table["kind"] == "rate"]
  table = table.groupby(["model", "condition"], as_index=False)["mae"].mean()
  found = averages.area(table, "mae")
  np.testing.assert_allclose(found["lnln"], 1.05 + 0.4 * 0.45)  # a line: its value in the middle
  np.testing.assert_allclose(found["self_mm"], 1.25 + 0.2 * 0.45)


def test_averages_are_over_rates_alone_and_spread_over_seeds():
  table = averages.averages(make_rows()).set_index("model")
  np.testing.assert_allclose(table.loc["lnln", "mae"], 1.05 + 0.4 * 1.4 / 3)
  np.testing.assert_allclose(table.loc["lnln", "mae_std"], 0.1 / np.sqrt(2))
  assert table.loc["lnln", "n"] == 2


def test_the_papers_values_stand_beside_ours():
  table = averages.beside_paper(make_rows(), papers.read("lnln", "mosi"))
  one = table[(table["condition"] == "rate=0") & (table["metric"] == "acc7")].set_index("model")
  paper = pd.read_csv(LNLN)
  paper = paper[(paper["dataset"] == "MOSI") & (paper["condition"] == "rate=0")]
  paper = paper[paper["metric"] == "acc7"].set_index("method")["value"]
  np.testing.assert_allclose(one.loc["self_mm", "paper"], paper["Self-MM"] / 100)
  np.testing.assert_allclose(one.loc["lnln", "paper"], paper["LNLN"] / 100)


def test_averages_stand_beside_the_papers_too():
  rows = [{**row, "f1_non0": 0.5, "f1_non0_swapped": 0.6} for row in make_rows()]
  table = averages.beside_paper(rows, papers.read("lnln", "mosi"))
  table = table[(table["condition"] == "rate=average") & (table["model"] == "lnln")]
  one = table.set_index("metric")
  np.testing.assert_allclose(one.loc["mae", ["ours", "paper"]].to_list(), [1.05 + 0.56 / 3, 1.046])
  assert one.loc["f1_non0_swapped", "paper"] == one.loc["f1_non0", "paper"]


def test_differences_from_a_baseline():
  table = averages.differences(make_rows(), "lnln").set_index("model")
  np.testing.assert_allclose(table.loc["self_mm", "Δ mae"], 0.2 - 0.2 * 1.4 / 3)
  assert np.isnan(table.loc["lnln", "p mae"]) and 0 < table.loc["self_mm", "p mae"] < 1


def test_three_models_are_corrected_for_their_number():
  rows = [{**row, "model": "almt", "mae": row["mae"] + 1} for row in make_rows()[:16]]
  table = averages.differences(make_rows() + rows, "lnln").set_index("model")
  p = table["p mae"].drop("lnln")
  assert table["Holm p mae"].drop("lnln").tolist() == tables.holm(p.tolist())
  small, large = sorted(p)
  np.testing.assert_allclose(
    sorted(table["Holm p mae"].drop("lnln")), [2 * small, max(2 * small, large)]
  )
  missing = averages.differences(make_rows(), "lnln", "missing").set_index("model")
  np.testing.assert_allclose(missing.loc["self_mm", "Δ mae"], 0.1)


def test_holms_correction():
  found = tables.holm([0.01, float("nan"), 0.04, 0.03, 0.005])
  np.testing.assert_allclose(found, [0.03, np.nan, 0.06, 0.06, 0.02])  # his example's arithmetic
  assert tables.holm([0.9, 0.8]) == [1.0, 1.0]


def test_what_lnlns_authors_corrected_is_corrected_and_marked():
  def one(dataset, condition, method, metric):
    table = papers.read("lnln", dataset)
    table = table[(table["condition"] == condition) & (table["method"] == method)]
    return table[table["metric"] == metric].iloc[0]

  for *where, value, printed in (
    ("mosi", "rate=0.7", "CENET", "acc5", 0.2357, "59.86"),
    ("mosi", "rate=average", "CENET", "acc5", 0.3362, "37.25"),
    ("sims", "rate=average", "ALMT", "f1", 0.6749, "72.76"),
    ("sims", "rate=average", "LNLN", "f1", 0.6918, "79.43"),
  ):
    found = one(*where)
    np.testing.assert_allclose(found["value"], value)
    assert found["note"] == f"corrected by the authors, printed {printed}"
  tetfn = papers.read("lnln", "mosei").query("method == 'TETFN'")
  assert len(tetfn) == 144 and tetfn["value"].isna().all()
  assert tetfn["note"].str.startswith("withdrawn").all()
  assert one("mosi", "rate=0.5", "LNLN", "acc5")["note"] == ""
  rows = [{**row, "model": "cenet", "acc5": 0.2} for row in make_rows()]
  rows = [{**row, "condition": "0.7"} for row in rows if row["condition"] == "0.5"]
  table = averages.beside_paper(rows, papers.read("lnln", "mosi")).set_index(
    ["condition", "metric"]
  )
  assert table.loc[("rate=0.7", "acc5"), "note"].startswith("corrected")


def test_the_printed_values_of_shared_are_ours(shared):
  """HRLF's tables as transcribed: available sets there, missing ones here."""
  theirs = pd.read_csv(shared("papers/hrlf_tables.csv"))
  columns = {column.title: column for column in protocols.PROTOCOLS["hrlf"].layout}
  for dataset, part in theirs.groupby("dataset"):
    ours = papers.read("hrlf", str(dataset))
    keys = zip(ours["condition"], ours["method"], ours["metric"], strict=True)
    values = dict(zip(keys, ours["value"], strict=True))
    for row in part.to_dict("records"):
      kept = row["condition"].removeprefix("available=")
      title = {"average_of_six": "Avg.", "complete": "{l,a,v}"}.get(
        kept, "{" + ",".join(kept) + "}"
      )
      metric = row["metric"].lower()
      metric = "f1_non0" if metric == "f1" else metric
      column = columns[title]
      model = row["model"].replace("_without_", " w/o ")
      key = (f"{column.kind}={column.condition}", model, metric)
      np.testing.assert_allclose(values[key], row["value"] / 100, err_msg=str(key))


def test_m3s_values_are_those_of_the_method_and_the_training_rate():
  table = papers.m3s("sims", "M³S", "0.4-0.6")
  paper = pd.read_csv(papers.FOLDER / "paper_m3s.csv")
  paper = paper[(paper["dataset"] == "SIMS") & (paper["method"] == "M3S")]
  paper = paper[paper["input_rate"] == "0.4-0.6"]
  assert len(table) == len(paper) > 0 and set(table["value"]) == set(paper["value"])
  assert table["condition"].str.startswith("interval=").all()


def test_a_table_as_printed_has_the_papers_rows_below_ours():
  layout = (("{v}", "missing", "la"), ("Avg.", "missing", "average"), ("all", "rate", "0"))
  paper = pd.DataFrame(
    [
      {"condition": "missing=la", "method": "Self-MM", "metric": "mae", "value": 0.3, "note": ""},
      {"condition": "missing=la", "method": "HRLF", "metric": "mae", "value": 0.2, "note": ""},
      {"condition": "missing=la", "method": "HRLF", "metric": "corr", "value": 0.9, "note": ""},
    ]
  )
  table = averages.as_printed(make_rows(), paper, layout, "mae")
  assert list(zip(table["model"], table["values"], strict=True)) == [
    ("lnln", "ours"),
    ("self_mm", "ours"),
    ("Self-MM", "paper"),
    ("HRLF", "paper"),
  ]
  np.testing.assert_allclose(table["{v}"], [1.25, 1.35, 0.3, 0.2])
  np.testing.assert_allclose(table["all"], [1.05, 1.25, np.nan, np.nan])
  assert table["n"].tolist() == [2, 2, 1, 1]  # two seeds, whatever the masks
  np.testing.assert_allclose(table.loc[0, "{v}_std"], 0.1 / np.sqrt(2))
  text = tables.readable(table)
  assert "±" in text.loc[0, "{v}"] and text.loc[2, "{v}"] == "0.300" and text.loc[2, "all"] == ""


@pytest.mark.parametrize("task", ["regression", "classification", "binary"])
def test_the_constant_is_the_best_of_the_training_labels(task):
  arrays = synthetic.make_arrays(num_train=60, num_valid=8, num_test=20)
  dataset = data.from_arrays(arrays, name="x", task=task)
  name, answer = constant.answer(dataset.train, dataset.spec)
  label = np.asarray(dataset.train.label)
  if task == "regression":
    assert name == "median" and answer == np.median(label)
  else:
    assert name == "majority" and answer.shape == (dataset.spec.num_classes,)
    values, counts = np.unique(label, return_counts=True)
    if task == "classification":
      assert answer.argmax() == values[counts.argmax()]
    else:  # no class is half of all: each problem's majority says no
      assert counts.max() < 30 and answer.argmax() == 0
  conditions = protocols.missing_or_complete(lambda rate: None)
  rows = constant.rows(dataset, conditions, column="model")
  assert len(rows) == 7 and rows[0]["model"] == name
  told = {k: v for k, v in rows[0].items() if k in metrics.names(dataset.spec)}
  assert set(told) == set(metrics.names(dataset.spec))
  assert all(row["split"] == "test" and row["selection"] for row in rows)


def test_the_papers_ablations_are_those_of_the_config():
  paper = pd.read_csv(LNLN, dtype={"table": str})
  paper = paper[paper["table"].isin(["4", "5", "7"])]["method"].str.removeprefix("LNLN ")
  ours = {
    name for key in ("components", "regularization", "weights") for name in lnln.ABLATIONS[key]
  }
  assert set(paper) == ours


def test_the_view_is_the_plane_of_the_first_cloud():
  plane = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 2)))[0]
  flat = np.random.default_rng(2).normal(size=(30, 2)) @ plane.T
  found = predictions.view({"0": flat, "0.9": flat + 3 * np.eye(4)[0]})
  distance = np.linalg.norm(flat[0] - flat[1])
  np.testing.assert_allclose(np.linalg.norm(found["rate 0"][0] - found["rate 0"][1]), distance)
  moved = found["rate 0.9"] - found["rate 0"]
  np.testing.assert_allclose(np.linalg.norm(moved[0]), 3 * np.linalg.norm(plane[0]))


def test_t_sne_keeps_clusters_apart_and_is_the_same_each_time():
  random = np.random.default_rng(0)
  clouds = {"0": random.normal(size=(12, 5)), "1": 50 + random.normal(size=(12, 5))}
  found = predictions.view(clouds, "tsne")
  near, far = (np.linalg.norm(found["rate 0"] - found[name].mean(0), axis=1) for name in found)
  assert (near < far).all()
  np.testing.assert_array_equal(found["rate 1"], predictions.view(clouds, "tsne")["rate 1"])


def test_laziness_of_one_answer():
  shown = {"m": {"0": LABEL, "0.9": np.full(6, 0.4)}}
  table = predictions.laziness(shown, LABEL, SPEC).set_index(["model", "condition"])
  assert table.loc[("m", "0.9"), "largest share"] == 1
  np.testing.assert_allclose(table.loc[("m", "0.9"), "entropy"], 0, atol=1e-9)
  assert table.loc[("labels", ""), "entropy"] == table.loc[("m", "0"), "entropy"] > 1.5


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A page of everything: two systems and the constant, 50 utterances."""
  out = tmp_path_factory.mktemp("report")
  random = np.random.default_rng(0)
  label = random.uniform(-3, 3, 50).astype(np.float32)
  names = ("lnln", "self_mm")
  conditions = [("rate", "0"), ("rate", "0.5"), ("rate", "0.9"), ("missing", "la")]
  tested = {name: {c: label * (-1) ** (n > 1) for n, c in enumerate(conditions)} for name in names}
  shown = {name: {"0": label, "0.9": label * 0} for name in names}
  points = random.normal(size=(2, 50, 5))
  features = {name: dict(zip(("0", "0.9"), points, strict=True)) for name in names}
  rows = make_rows()
  fixed = {"model": "median", "selection": constant.SELECTION, "mae": 1.4, "acc7": 0.2}
  rows += [row | fixed for row in rows if row["model"] == "lnln"]
  words = {
    "command": "python -m experiments.robustness --configs=lnln,<b>",
    "selection": page.selection_in_words(True, "missing rate 0.5"),
  }
  counted = [
    {"kind": "rate", "condition": "0.5", "modality": "all", "missing steps": 7, "of steps": 14}
  ]
  protocol = dataclasses.replace(
    protocols.PROTOCOLS["lnln"],
    layout=(protocols.Column("{v}", "missing", "la"),),
    metrics=("acc7", "f1_happy"),
  )
  return page.write(
    page.Results(rows, tested, shown, features, {"lnln": 1.5, "self_mm": 0.5}),
    label,
    SPEC,
    [f"video$_${n}" for n in range(50)],
    out,
    words,
    dataset="mosi",
    protocol=protocol,
    paper=papers.read("lnln", "mosi"),
    missing=counted,
    quantity="p, probability of each step to go missing",
    baseline="lnln",
  )


def test_the_page_and_the_files_hold_everything(written):
  text, folder = written.read_text(encoding="utf-8"), written.parent
  assert len(text.encode()) < 1.5e6 and "lnln,&lt;b&gt;" in text and "TEST ORACLE" in text
  assert "p, probability of each step to go missing" in text
  for name in ("robustness", "missing", "confusion", "view"):
    assert (folder / f"{name}.png").stat().st_size > 5000
  for name in ("average_rate", "average_missing", "rate", "missing", "beside_paper", "differences"):
    table = pd.read_csv(folder / f"{name}.csv")
    assert (table["split"] == "test").all() and r"\toprule" in (folder / f"{name}.tex").read_text()
  assert "{v}" in (folder / "table_acc7.md").read_text() and "f1_happy" not in text
  assert pd.read_csv(folder / "missing_data.csv")["missing share"].tolist() == [0.5]
  flipped = pd.read_csv(folder / "flips.csv").set_index(["model", "condition"])
  assert flipped.loc[("lnln", "0.9"), ["flipped", "right to wrong"]].tolist() == [1, 1]
  assert flipped.loc[("lnln", "0.5"), "flipped"] == 0


def test_the_page_in_a_browser(written):
  """It sorts, loads nothing, complains of nothing, and fits 500 pixels, in light and in dark."""
  command = browser.find()
  if command is None:
    pytest.skip("needs Chromium (apt-get install chromium)")  # `.ci/run` installs it, or says so
  with browser.Browser(command) as chromium:
    chromium.open(written, width=500, dark=True)
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = chromium.run(paper)
    assert chromium.run("document.documentElement.scrollWidth") == 500
    chromium.run("document.querySelector('[data-theme=light]').click()")
    light = chromium.run(paper)
    chromium.open(written)
    assert chromium.run(paper) == light != dark
    chromium.run("document.querySelector('[data-theme=dark]').click()")
    assert chromium.run(paper) == dark

    # sorting: the best value first, then the other way round
    click = "document.querySelectorAll('#rate table thead button')[1].click()"
    column = "[...document.querySelectorAll('#rate table')[0].rows].map(r => r.cells[0].innerText)"
    assert chromium.run(f"{click}; {column}")[1:] == ["lnln", "self_mm", "median"]
    assert chromium.run(f"{click}; {column}")[1:] == ["median", "self_mm", "lnln"]
    assert chromium.run("document.querySelector('#rate th[aria-sort]').ariaSort") == "descending"

    # figures: described, switched off line by line, told under the pointer
    assert chromium.run("[...document.querySelectorAll('.chart')].every(c => c.ariaLabel)")
    count = "document.querySelectorAll('#rate .chart path[aria-roledescription=point]').length"
    assert chromium.run(count) == 3 * 3
    chromium.run("document.querySelector('[data-line=lnln]').click()")
    chromium.wait(f"{count} === 2 * 3")
    where = chromium.run(
      "(() => { const p = document.querySelector('#rate path[aria-roledescription=point]');"
      " p.scrollIntoView({block: 'center', behavior: 'instant'});"
      " const b = p.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] })()"
    )
    chromium.point(*where)
    chromium.wait("document.querySelector('#vg-tooltip-element.visible')")
    assert "self_mm" in chromium.run("document.querySelector('#vg-tooltip-element').innerText")

    # utterances
    rows = "document.querySelector('.flips tbody').rows.length"
    assert chromium.run(rows) == 40
    find = "const box = document.querySelector('.flips input'); box.value = '$_$49'"
    assert chromium.run(f"{find}; box.dispatchEvent(new Event('input')); {rows}") == 1
    assert "self_mm" in chromium.run("document.querySelector('.flips select').innerText")

    # on paper: as in light, without what is there to be clicked
    chromium.open(written, dark=True, media="print")
    ink = "getComputedStyle(document.body).color"
    assert sum(map(int, re.findall(r"\d+", chromium.run(ink)))) < 3 * 64
    shown = "[...document.querySelectorAll('nav, .theme, .controls')].filter(e => e.offsetParent)"
    assert chromium.run(f"{shown}.length") == 0
  assert chromium.complaints == []
  assert {address.partition(":")[0] for address in chromium.requests} <= {"file"}


def test_who_leads_by_how_much_and_how_sure_that_is():
  rows = make_rows()
  rows += [
    {**row, "model": "median", "selection": constant.SELECTION, "mae": 1.4} for row in rows[:16]
  ]
  table = summary.leaders(rows, {"rate": "missing rates"}, ["mae", "acc7"]).set_index("metric")
  mae = table.loc["mae"]
  assert (mae["leader"], mae["next"], mae["n"]) == ("lnln", "self_mm", 2)
  np.testing.assert_allclose(mae["lead"], 0.2 - 0.2 * 1.4 / 3)
  p = averages.differences(rows[:32], "lnln").set_index("model").loc["self_mm", "p mae"]
  np.testing.assert_allclose([mae["p"], mae["Holm p"]], p)  # the constant is no rival
  assert mae["constant"] == 1.4 and table.loc["acc7", "lead"] == 0
  (told,) = summary.sentences(table.reset_index(), {"rate": "missing rates"})
  assert "<b>lnln</b> leads on missing rates" in told and "<b>self_mm</b>" in told
  warned = summary.cautions(rows, {"rate": "missing rates"}, "mae")
  assert any("below 5" in one for one in warned) and not any("constant" in one for one in warned)
  rows = [row | {"mae": row["mae"] + 1} for row in rows[:32]] + rows[32:]
  warned = summary.cautions(rows, {"rate": "missing rates"}, "mae")
  assert "lnln, self_mm" in next(one for one in warned if "constant" in one)


def test_tables_mark_the_best_of_what_competes():
  frame = pd.DataFrame(
    {"model": ["a", "b", "median"], "n": [3, 3, 1], "mae": [1.0, 0.9, 0.1], "corr": [0.2, 0.1, 0.0]}
  )
  text = markup.table(frame, "c", beside=["median"])
  assert text.count('class="best"') == 2
  assert "<strong>0.900</strong>" in text and "<strong>0.200</strong>" in text
  assert "lower is better" in text and ">n<" not in text


def test_methods_against_a_baseline(tmp_path, capsys):
  """Mask seeds are averaged within a run; deltas, Welch's p and the paper's values follow."""
  values = {"ORIG": [1.0, 1.2, 1.1], "M3S": [0.7, 0.9, 0.8]}
  rows = [
    {
      "missing_rate": "0.4-0.6",
      "method": method,
      "split": "test",
      "selection": "valid/mae at rate 0.4-0.6",
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
  table = methods.comparison(
    rows,
    tmp_path,
    paper,
    conditions=["0.4-0.6", "0.6-0.8"],
    model="self_mm",
    dataset="sims",
  )
  orig, m3s, *shifted = table.to_dict("records")
  np.testing.assert_allclose([row["mean"] for row in shifted], [2.1, 1.8])
  assert [row["test_rate"] for row in shifted] == ["0.6-0.8"] * 2
  assert (orig["method"], m3s["method"], m3s["n"]) == ("ORIG", "M3S", 3)
  np.testing.assert_allclose([orig["mean"], m3s["mean"], m3s["delta"]], [1.1, 0.8, -0.3])
  np.testing.assert_allclose([orig["std"], m3s["std"]], [0.1, 0.1])
  t = 0.3 / np.sqrt(2 * 0.1**2 / 3)  # equal variances: 4 degrees of freedom
  np.testing.assert_allclose(m3s["p"], 2 * stats.t.sf(t, 4))
  assert m3s["p_holm"] == m3s["p"] and m3s["selection"].startswith("valid/mae")
  assert np.isnan(orig["p"]) and m3s["paper"] == 0.5053 and np.isnan(orig["paper"])
  assert "0.8000 ± 0.1000" in (tmp_path / "comparison.md").read_text(encoding="utf-8")
  assert "toprule" in (tmp_path / "comparison.tex").read_text(encoding="utf-8")
  assert "M3S" in capsys.readouterr().out
