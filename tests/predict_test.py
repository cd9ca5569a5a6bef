"""Trained runs without their data: loading, predicting own files, serving, per-sample tables."""

import json
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import mmjax
from command import call, refused
from experiments import build, settings, workdir
from mmjax import (
  bert,
  check,
  checkpoint,
  conversations,
  data,
  files,
  metrics,
  predict,
  runs,
  serving,
  synthetic,
  train,
  types,
)

ARRAYS = synthetic.make_arrays(seed=1, num_train=64, num_valid=24, num_test=24)
BERT = dict(
  vocab_size=2048,
  hidden_size=8,
  num_hidden_layers=1,
  num_attention_heads=1,
  intermediate_size=8,
)


def write_run(folder, name, **entries):
  """The folder of a run that was not trained: as training leaves it, with its first parameters."""
  config = settings.load("quickstart:tiny")
  settings.assign_all(config, {"model.hidden_size": 4, **entries})
  run = build.make_run(config, build.load_data(config, folder / "data"))
  params, extra = run.recipe.system.init(run.key, run.dataset.spec)
  asked = build.describe(config, folder / "data")
  path = workdir.Workdir(folder / name, asked, folder / "data", build.reading(run))
  best = train.Best(np.float32(0.5), np.int32(3), params, extra)
  checkpoint.save(path.checkpoints, 0, {"best": dict.fromkeys(run.recipe.select, best)})
  path.close()
  return folder / name


@pytest.fixture(scope="module")
def scores(folder):
  """A run of features that are standardized; it never sees audio."""
  return write_run(folder, "scores", **{"data.standardize": True, "mask.drop": ("audio",)})


@pytest.fixture(scope="module")
def classes(folder):
  """A run that reads tokens and tells classes."""
  asked = {"data.text": "tokens", "data.task": "classification", "model.bert": BERT}
  return write_run(folder, "classes", **asked)


@pytest.fixture(scope="module")
def loaded(scores):
  """The first run, its data, and what it makes of the test split."""
  run = mmjax.load(scores)
  dataset = data.from_arrays(ARRAYS, name="tiny", standardize=True)
  return run, dataset, predict.predict(run, dataset.test, ("prediction", "feature"))


def unlabelled(fields):
  return {key: v for key, v in fields.items() if "labels" not in key and key != "annotations"}


def sample(row, **changes):
  """A sample as MMSA-FET writes it: no axis of rows, no id, a list of tokens, no padding."""
  fields = ARRAYS["test"]
  words = int(fields["text_bert"][row][1].sum())
  found = {"text": fields["text"][row][:words], "text_bert": fields["text_bert"][row][:, :words]}
  for m in ("audio", "vision"):
    found[m] = fields[m][row][: fields[f"{m}_lengths"][row]]
  found |= {"raw_text": "one", **changes}
  return {key: value for key, value in found.items() if value is not None}


def save(path, found):
  path.write_bytes(pickle.dumps(found))
  return path


def predictions(workdir, path, *more):
  out = path.parent / "predictions.csv"
  code, output = call("predict", f"--workdir={workdir}", f"--pickle={path}", f"--out={out}", *more)
  assert code == 0, output
  assert not list(path.parent.glob("*.part"))
  return pd.read_csv(out), output


def test_answers_to_binary_problems_are_told_by_their_names():
  arrays = {
    split: {**fields, "classification_labels": np.arange(len(fields["id"])) % 4}
    for split, fields in ARRAYS.items()
  }
  dataset = data.from_arrays(arrays, name="iemocap", task="binary")
  classes = runs.reading_of(dataset, {}, (), ("valid/acc",)).classes
  named = [classes[label] for label in dataset.train.label[:4]]
  assert named == ["neutral", "happy", "sad", "angry"]
  assert len(classes) == 16 and classes[0] == "none" and classes[0b0110] == "happy+sad"


def test_a_folder_alone_tells_how_data_are_read(scores, loaded, tmp_path):
  run, dataset = mmjax.load(shutil.copytree(scores, tmp_path / "moved")), loaded[1]
  assert run.spec == dataset.spec and run.reading.drop == ("audio",)
  assert run.reading.moments.keys() == dataset.moments.keys() == {"audio", "vision"}
  for m, moments in dataset.moments.items():
    np.testing.assert_array_equal(run.reading.moments[m], moments)
  assert (run.epoch, run.score) == (3, 0.5)


def test_the_folder_of_a_bert_may_be_gone(loaded, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **BERT}))
  model = {"name": "misa", "bert": {"folder": str(tmp_path), "hidden_dropout_prob": 0.3}}
  runs.write_reading(tmp_path, runs.reading_of(loaded[1], model, (), ("valid/mae",)))
  (tmp_path / "config.json").write_text(json.dumps({"format": runs.FORMAT}))
  found = runs.read_reading(tmp_path).bert
  setup = bert.setup(found)
  assert setup.folder is None and setup.from_scratch
  assert setup.config == bert.make_config({**BERT, "hidden_dropout_prob": 0.3})


def test_splits_without_labels_are_read_as_in_training(scores, loaded, tmp_path):
  run, dataset, found = loaded
  arrays = {split: unlabelled(ARRAYS[split]) for split in ("valid", "test")}
  inputs = predict.prepare(arrays, "own.pkl", run.reading)
  for m in types.MODALITIES:
    ours = data.take(inputs.batch, slice(24, None))
    jax.tree.map(np.testing.assert_array_equal, getattr(ours, m), getattr(dataset.test, m))
  table, output = predictions(scores, save(tmp_path / "own.pkl", arrays))
  assert list(table) == ["id", "split", "text", "audio", "vision", "prediction"]
  assert table["id"].tolist() == dataset.ids["valid"] + dataset.ids["test"]
  assert table["split"].tolist() == ["valid"] * 24 + ["test"] * 24
  np.testing.assert_allclose(table["prediction"][24:], found["prediction"], atol=1e-6)
  assert "note: this run never sees audio" in output
  audio = dataset.test.audio
  changed = audio._replace(x=np.where(audio.valid[..., None], np.float32(9), audio.x))
  other = predict.predict(run, dataset.test._replace(audio=changed))["prediction"]
  np.testing.assert_array_equal(other, found["prediction"])


def test_conversations_are_those_that_training_would_make(loaded, tmp_path):
  ids = {
    split: [f"Ses{s}{n % 3}_x_{'FM'[n % 2]}{n:03d}" for n in range(len(ARRAYS[split]["id"]))]
    for s, split in enumerate(check.SPLITS)
  }
  dataset = conversations.group(loaded[1]._replace(ids=ids))
  runs.write_reading(tmp_path, runs.reading_of(dataset, {}, (), ("valid/mae",)))
  (tmp_path / "config.json").write_text(json.dumps({"format": runs.FORMAT}))
  reading = runs.read_reading(tmp_path)
  named = {**unlabelled(ARRAYS["test"]), "id": ids["test"]}
  inputs = predict.prepare(named, "own.pkl", reading)
  for column in conversations.COLUMNS:
    np.testing.assert_array_equal(inputs.batch.info[column], dataset.test.info[column])
  assert "24 utterances of 3 conversations, by the videos in their ids" in inputs.notes
  with pytest.raises(data.DataError, match="key 'id': found the speaker of 'Ses21_x_M001'"):
    predict.prepare(named, "own.pkl", reading._replace(speakers=("F",)))
  # names of our own making, and those of a training without videos, tell nothing
  for fields, known in ((unlabelled(sample(0)), reading), (named, reading._replace(turns=1))):
    alone = predict.prepare(fields, "own_3.pkl", known)
    assert not alone.batch.info["turn"].any()
    assert any("hold no video" in note for note in alone.notes)


def test_one_sample_of_its_own_length_and_its_representation(scores, loaded, tmp_path):
  found = loaded[2]
  path = save(tmp_path / "clip.pkl", sample(3))
  table, _ = predictions(scores, path, f"--features={tmp_path / 'clip.npz'}")
  assert table["id"].tolist() == ["clip"] and "split" not in table
  assert table["prediction"][0] == pytest.approx(found["prediction"][3], abs=1e-6)
  with np.load(tmp_path / "clip.npz") as kept:
    assert kept["id"].tolist() == ["clip"] and kept["vision"].tolist() == ["present"]
    np.testing.assert_allclose(kept["feature"], found["feature"][3:4], atol=1e-5)
  longer = np.concatenate([ARRAYS["test"]["vision"][3], np.ones((9, 12), np.float32)])
  inputs = predict.prepare(sample(3, vision=longer), "clip.pkl", loaded[0].reading)
  assert inputs.batch.vision.x.shape == (1, 25, 12) and inputs.batch.vision.valid.all()
  assert any("of 34 steps the first 25 are read" in note for note in inputs.notes)


def test_what_is_missing_is_told_of_each_row(loaded):
  reading = loaded[0].reading
  fields = unlabelled(ARRAYS["test"])
  some = np.array(fields["vision"])
  some[2] = 0
  inputs = predict.prepare({**fields, "vision": some}, "own.pkl", reading)
  assert np.flatnonzero(~inputs.found["vision"]).tolist() == [2]
  assert inputs.found["text"].all() and inputs.found["audio"].all()
  # without a modality every step of it is missing, as in evaluation
  for m, dim in (("text", 32), ("audio", 8), ("vision", 12)):
    lacking = ("text", "text_bert", "raw_text") if m == "text" else (m,)
    rest = {key: value for key, value in fields.items() if key not in lacking}
    inputs = predict.prepare(rest, "own.pkl", reading)
    one = getattr(inputs.batch, m)
    assert not inputs.found[m].any() and one.x.shape[2] == dim
    assert one.valid.all() and not one.seen.any()
    others = {name: getattr(inputs.batch, name) for name in types.MODALITIES if name != m}
    whole = predict.prepare(fields, "own.pkl", reading).batch
    for name, other in others.items():
      jax.tree.map(np.testing.assert_array_equal, other, getattr(whole, name))


def test_what_cannot_be_predicted_is_told_with_the_key_before_any_work(scores, classes, tmp_path):
  out = f"--out={tmp_path / 'out.csv'}"

  def told(workdir, found, *more):
    path = save(tmp_path / "own.pkl", found)
    return refused("predict", f"--workdir={workdir}", f"--pickle={path}", *(more or [out]))

  wide = ARRAYS["test"]["audio"][0][:, :5]
  for change, words in (
    ({"audio": wide}, "own.pkl, key 'audio': found 5 channels, expected 8 channels"),
    ({"text": None}, "key 'text': found the keys"),
    ({"vision": np.ones(3)}, "key 'vision': found shape (1, 3), expected 3 axes"),
    ({"vision_lengths": 99}, "key 'vision_lengths': found 99"),
    (dict.fromkeys(("text", "audio", "vision", "text_bert", "raw_text")), "at least one of text"),
  ):
    assert words in told(scores, sample(0, **change))
  assert "key 'text_bert'" in told(classes, sample(0, text_bert=None))
  beyond = np.array(sample(0)["text_bert"])
  beyond[0, 1] = 5000
  assert "the token id 5000" in told(classes, sample(0, text_bert=beyond))
  assert "found a list" in told(scores, [1])
  for wrong, words in (
    (f"--out={tmp_path / 'a.txt'}", "ends in .csv"),
    (f"--out={tmp_path / 'b' / 'a.csv'}", "make it first"),
  ):
    assert words in told(scores, sample(0), wrong)
  assert "--pickle is missing" in refused("predict", f"--workdir={scores}", out)
  assert not (tmp_path / "out.csv").exists()


def test_classes_by_name_with_their_probabilities(classes, tmp_path):
  fields = unlabelled(ARRAYS["test"])
  table, _ = predictions(classes, save(tmp_path / "own.pkl", fields))
  names = ["Negative", "Neutral", "Positive"]
  shares = table[[f"p_{name}" for name in names]].to_numpy()
  np.testing.assert_allclose(shares.sum(1), 1, atol=1e-6)
  assert table["prediction"].tolist() == [names[n] for n in shares.argmax(1)]
  short, _ = predictions(classes, save(tmp_path / "clip.pkl", sample(5)))
  for name in names:
    assert short[f"p_{name}"][0] == pytest.approx(table[f"p_{name}"][5], abs=1e-5)


def test_a_served_prediction_is_the_librarys(classes, loaded, tmp_path):
  path = tmp_path / "model.jaxexport"
  code, output = call("export", f"--workdir={classes}", f"--out={path}")
  assert code == 0 and "serving.read" in output, output
  told = mmjax.load(classes)
  whole = predict.prepare(unlabelled(ARRAYS["test"]), "own.pkl", told.reading).batch
  for run, batch, exported in (
    (told, whole, serving.read(path)),
    (loaded[0], loaded[1].test, mmjax.export(loaded[0])),
  ):
    ours = predict.predict(run, batch, ("prediction", "feature"))
    for rows in (1, 5):
      served = exported.call(data.take(batch, slice(0, rows)))
      for name, values in ours.items():
        np.testing.assert_allclose(served[name], values[:rows], rtol=1e-4, atol=1e-5)
  assert "no exported model" in _message(lambda: serving.read(classes / "config.json"))
  assert "no such file" in _message(lambda: serving.read(tmp_path / "gone"))


def _message(function):
  with pytest.raises(types.UsageError) as told:
    function()
  return str(told.value)


def test_what_needs_to_know_the_number_of_rows_is_told_to_give_it(loaded):
  run = loaded[0]

  def of_known_rows(params, batch, extra):
    del params, extra
    return {"prediction": jnp.arange(float(int(batch.index.shape[0])))}

  own = run._replace(system=run.system._replace(predict=of_known_rows))
  assert "give a batch_size" in _message(lambda: serving.export(own))
  four = serving.export(own, batch_size=4).call(data.take(loaded[1].test, slice(0, 4)))
  np.testing.assert_array_equal(four["prediction"], np.arange(4.0))
  assert "gives no 'feature'; it gives prediction" in _message(
    lambda: predict.predict(own, loaded[1].test, ("feature",))
  )


@pytest.mark.parametrize("suffix", ["csv", "npz"])
def test_evaluation_keeps_what_is_predicted_of_each_sample(scores, loaded, tmp_path, suffix):
  _, dataset, _ = loaded
  path = tmp_path / f"samples.{suffix}"
  asked = (f"--workdir={scores}", "--rates=0,0.5", "--mask_seeds=2", f"--out={tmp_path}")
  code, output = call("evaluate", *asked, f"--predictions={path}")
  assert code == 0, output
  rows = pd.read_csv(tmp_path / "robustness_runs.csv")
  if suffix == "csv":
    found = pd.read_csv(path, dtype={"condition": str})
    assert list(found) == ["kind", "condition", "mask_seed", "id", "label", "prediction"]
    assert found["id"].tolist() == dataset.ids["test"] * 4
    cells = [part for _, part in found.groupby(["condition", "mask_seed"], sort=False)]
    pairs = [(cell["prediction"].to_numpy(), cell["label"].to_numpy()) for cell in cells]
  else:
    with np.load(path) as kept:
      assert kept["condition"].tolist() == ["0", "0.5"] and kept["mask_seed"].tolist() == [0, 1]
      assert kept["id"].tolist() == dataset.ids["test"]
      pairs = [(one, kept["label"]) for one in kept["prediction"].reshape(4, -1)]
  for (prediction, label), mae in zip(pairs, rows["mae"], strict=True):
    assert metrics.compute(dataset.spec, prediction, label)["mae"] == pytest.approx(mae, rel=1e-5)
  assert "ends in" in refused("evaluate", *asked, f"--predictions={tmp_path / 'a.txt'}")


# -- files -----------------------------------------------------------------------------------


def flat(arrays, mark="/"):
  return {f"{s}{mark}{k}": np.asarray(v) for s, fields in arrays.items() for k, v in fields.items()}


def numbers(arrays):
  """Without strings, which safetensors has not."""
  strings = ("id", "raw_text", "annotations")
  return {s: {k: v for k, v in f.items() if k not in strings} for s, f in arrays.items()}


def test_archives_and_files_by_split_or_modality_are_read_as_one_pickle(tmp_path):
  import safetensors.numpy

  def compare(paths, expected):
    found = files.read(paths).content
    assert found.keys() == expected.keys()
    for split, fields in expected.items():
      assert found[split].keys() == fields.keys()
      for key, value in fields.items():
        np.testing.assert_array_equal(np.asarray(found[split][key]), np.asarray(value))

  np.savez(tmp_path / "all.npz", **flat(ARRAYS))
  compare([tmp_path / "all.npz"], ARRAYS)
  safetensors.numpy.save_file(flat(numbers(ARRAYS), "."), tmp_path / "all.safetensors")
  compare([tmp_path / "all.safetensors"], numbers(ARRAYS))
  by_split = [save(tmp_path / f"mosi_{split}.pkl", fields) for split, fields in ARRAYS.items()]
  compare(by_split, ARRAYS)
  rest = {s: {k: v for k, v in f.items() if k != "audio"} for s, f in ARRAYS.items()}
  named = {s: {"id": f["id"], "audio": f["audio"]} for s, f in ARRAYS.items()}
  alone = {split: fields["audio"] for split, fields in ARRAYS.items()}
  first = save(tmp_path / "rest.pkl", rest)
  more = [save(tmp_path / "more.pkl", named), save(tmp_path / "audio.pkl", alone)]
  for other, notes in zip(more, ([], ["by the order of their rows"]), strict=True):
    compare([first, other], ARRAYS)
    found = files.read([first, other])
    assert len(found.notes) == len(notes) and all(n in found.notes[0] for n in notes)
    # a fault is told with the file that it stands in
    with pytest.raises(data.DataError, match=f"^{other}, split 'train', key 'audio'"):
      check.check({**found.content, "train": {**ARRAYS["train"], "audio": 1}}, found.name, "any")


def test_files_that_do_not_go_together_are_told_by_name(tmp_path):
  whole = save(tmp_path / "whole.pkl", ARRAYS)
  ids = {s: {"id": f["id"][::-1]} for s, f in ARRAYS.items()}
  for other, name, words in (
    (
      ids,
      "ids.pkl",
      "ids.pkl, split 'train', key 'id': found other values, expected the same as in",
    ),
    (ARRAYS["test"], "some.pkl", "some.pkl: found the fields of one split"),
    ({s: f["audio"] for s, f in ARRAYS.items()}, "sound.pkl", "as audio.pkl"),
  ):
    with pytest.raises(data.DataError) as told:
      files.read([whole, save(tmp_path / name, other)])
    assert words in str(told.value)
  np.savez(tmp_path / "objects.npz", id=np.array(["a", None], object))
  (tmp_path / "cut.safetensors").write_bytes(b"cut")
  for name in ("objects.npz", "cut.safetensors", "gone.npz"):
    with pytest.raises(data.DataError, match=name):
      files.read([tmp_path / name])
