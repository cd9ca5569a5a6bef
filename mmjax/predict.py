"""Features without labels -> what a trained model predicts of them.

`prepare` makes a batch of what stands in a file, `predict` runs a model that `runs.load` gave:

  run = mmjax.load("runs/misa-m3s")
  inputs = predict.prepare(files.read_file("clip.pkl"), "clip.pkl", run.reading)
  score = predict.predict(run, inputs.batch)["prediction"]  # [N]
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mmjax import check, conversations, data, evaluate, masking, runs, types


class Inputs(NamedTuple):
  """Samples to predict.

  Attributes:
    batch: N rows with the shapes of the run's spec; labels are 0. A modality that a file lacks is
      there with every step missing, as evaluation has it. For a run that reads conversations,
      grouped by the video in the ids.
    ids: N names; of the file, split and row where there are none.
    splits: N names of the splits; "" where the file has none.
    found: modality -> [N] bool, whether the row has any of it: a step that is not all zeros, a
      token between [CLS] and [SEP].
    notes: what the user should know, one sentence each.
  """

  batch: types.Batch
  ids: list[str]
  splits: list[str]
  found: dict[str, np.ndarray]
  notes: list[str]


def prepare(found: Any, path: str, reading: runs.Reading) -> Inputs:
  """Checks features and gives them the shapes that a run was trained with.

  Args:
    found: in the MMSA layout (see `data`): splits of any names, the fields of one split, or those
      of one sample without the axis of rows, as MMSA-FET's `run_single` writes them. Labels are not
      read. Longer sequences than the training's are cut at their end, shorter ones padded.
    path: the file, for messages.
    reading: of the run.

  Returns:
    The samples of all splits.

  Raises:
    DataError: if there is a fault, or the run cannot read these features.
  """
  if not isinstance(found, Mapping):
    check.fail(path, found=f"a {type(found).__name__}", expected="a dictionary of arrays")
  splits = {str(k): v for k, v in found.items() if isinstance(v, Mapping)} or {"": found}
  parts = [_prepare(fields, path, split, reading) for split, fields in splits.items()]
  batch = jax.tree.map(lambda *rows: np.concatenate(rows), *(part.batch for part in parts))
  batch = batch._replace(index=np.arange(len(batch.index), dtype=np.int32))
  inputs = Inputs(
    data.scale(batch, reading.moments),
    [name for part in parts for name in part.ids],
    [name for part in parts for name in part.splits],
    {m: np.concatenate([part.found[m] for part in parts]) for m in types.MODALITIES},
    list(dict.fromkeys(note for part in parts for note in part.notes)),
  )
  return _group(inputs, splits, path, reading) if reading.turns else inputs


def _group(inputs, splits, path, reading) -> Inputs:
  """Tells the conversations of the samples, as `conversations.group` does it in training."""
  names, lone, speakers = [], [], reading.speakers
  for name, split in zip(inputs.ids, inputs.splits, strict=True):
    # a name that we gave holds a number, but no video; nor did any id of the training, maybe
    known = reading.turns > 1 and splits[split].get("id") is not None
    one = conversations.parse(name) if known else None
    if one and one.speaker and speakers and one.speaker not in speakers:
      expected = f"one of {', '.join(speakers)}, who speak in the training's data"
      check.fail(path, split, "id", found=f"the speaker of {name!r}", expected=expected)
    if one is None:
      lone.append(name)
    else:
      speaker = one.speaker if speakers else ""
      one = one._replace(video=f"{split}/{one.video}", speaker=speaker)
    names.append(one)
  columns = conversations.columns(names, speakers)
  count = columns["conversation"].max() + 1
  notes = [f"{len(names)} utterances of {count} conversations, by the videos in their ids"]
  if lone:
    notes.append(
      f"{len(lone)} ids hold no video, such as {lone[0]!r}: each of these utterances is a"
      " conversation of its own (expected are ids like video$_$3, video_3 or video[3])"
    )
  batch = inputs.batch._replace(info={**inputs.batch.info, **columns})
  return inputs._replace(batch=batch, notes=inputs.notes + notes)


def _prepare(fields: Mapping[str, Any], path: str, split: str, reading: runs.Reading) -> Inputs:
  spec, tokens = reading.spec, reading.spec.text.tokens
  fields = {str(key): value for key, value in fields.items() if value is not None}
  if sample := _is_sample(fields):
    fields = {key: [value] for key, value in fields.items()}
  keys = {"text": "text_bert" if tokens else "text", "audio": "audio", "vision": "vision"}
  lacking = [m for m, key in keys.items() if key not in fields]
  _check_keys(fields, path, split, lacking, tokens)
  clean, notes = check.check_inputs(fields, path, split, lacking)
  if "id" not in fields:
    stem = pathlib.Path(path).stem
    named = [stem] if sample else [f"{split or stem}_{row}" for row in range(len(clean["id"]))]
    clean["id"] = np.array(named, object)
    notes = [note for note in notes if not note.startswith("there are no ids")]
  for m in types.MODALITIES:
    width, right = clean.get(m, np.zeros((1, 1, 0))).shape[2], getattr(spec, m).dim
    if m not in lacking and right and width != right:
      expected = f"{right} channels, as the data have that this run was trained on"
      check.fail(path, split, m, found=f"{width} channels", expected=expected)
  batch = _batch(clean, lacking, path, reading)
  shown = {}
  for m, key in keys.items():
    if m in lacking:
      shown[m] = np.zeros(len(clean["id"]), bool)
      continue
    by_tokens = m == "text" and tokens
    shown[m] = batch.text.valid.sum(1) > 2 if by_tokens else np.any(clean[m] != 0, (1, 2))
    had, has = clean[key].shape[2 if by_tokens else 1], getattr(spec, m).length
    if had > has:
      where = f"{split or path}/{key}"
      notes.append(f"{where}: of {had} steps the first {has} are read, as many as in training")
  names = [str(name) for name in clean["id"]]
  return Inputs(batch, names, [split] * len(names), shown, notes)


def _is_sample(fields: Mapping[str, Any]) -> bool:
  """Whether the axis of rows is not there."""
  for key in ("audio", "vision", "text", "text_bert"):
    if key in fields:
      try:
        return np.ndim(fields[key]) == check.RANKS[key] - 1
      except ValueError:  # rows of unlike lengths
        return False
  return False


def _check_keys(fields, path, split, lacking, tokens) -> None:
  keys = f"the keys {sorted(fields)}"
  if tokens and "text" in lacking:
    expected = (
      "token ids [N, 3, L], which this run reads; `mmjax.bert.tokenize` makes them of raw text, and"
      " rows of [CLS] and [SEP] alone stand for no text"
    )
    check.fail(path, split, "text_bert", found=keys, expected=expected)
  if len(lacking) == len(types.MODALITIES):
    check.fail(path, split, found=keys, expected="at least one of text, audio and vision")
  other = [key for key in ("text_bert", "raw_text") if key in fields]
  if "text" in lacking and other:
    expected = (
      f"the features [N, L, D] that this run reads; leave out {' and '.join(other)} to predict"
      " without text"
    )
    check.fail(path, split, "text", found=keys, expected=expected)


def _batch(clean, lacking, path, reading) -> types.Batch:
  """Checked fields as a batch of the run's shapes."""
  spec, rows = reading.spec, len(clean["id"])
  fields = dict(clean)
  if "text" in lacking:  # which would tell how long aligned modalities are
    for m in ("audio", "vision"):
      if m in fields:
        fields.setdefault(f"{m}_lengths", data.until_last_nonzero(fields[m]).sum(1))
  for m in lacking:
    fields |= {m: np.zeros((rows, 1, 1), np.float32), f"{m}_lengths": np.zeros(rows, int)}
  task = "classification" if spec.num_classes else "regression"
  fields[check.LABELS[task == "classification"]] = np.zeros(rows)
  batch = data.make_split(fields, path, "tokens" if spec.text.tokens else "features", task)
  info = {}
  if spec.text.tokens:  # always, so that all batches are alike
    segments = np.asarray(fields["text_bert"][:, 2], np.int32)
    info["segment_ids"] = _fit(segments, spec.text.length)
  fitted = {}
  for m in types.MODALITIES:
    if m not in lacking:
      one, length = getattr(batch, m), getattr(spec, m).length
      fitted[m] = types.modality(_fit(one.x, length), _fit(one.valid, length))
  absent = {m: _absent(rows, m, spec, fitted) for m in lacking}
  return batch._replace(info=info, **fitted, **absent)


def _fit(x: np.ndarray, steps: int) -> np.ndarray:
  """[N, L, …] -> [N, steps, …], cut or padded with zeros at the end."""
  x = x[:, :steps]
  return np.pad(x, [(0, 0), (0, steps - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])


def _absent(rows, name, spec, fitted) -> types.Modality:
  """Every step missing: as many as a modality has that it would be aligned with, else all."""
  own = getattr(spec, name)
  aligned = [one.valid for one in fitted.values() if one.valid.shape[1] == own.length]
  valid = aligned[0] if aligned else np.ones((rows, own.length), bool)
  x = np.zeros((rows, own.length, own.dim), np.float32)
  return types.modality(x, valid, ~valid[..., None])


def check_run(run: runs.Trained, batch: types.Batch, outputs: Sequence[str]) -> None:
  """Raises a `UsageError` if the model has no such outputs, or a token is beyond its vocabulary."""
  spec = run.spec
  if spec.text.tokens:
    spec = spec._replace(text=spec.text._replace(vocab=int(np.max(batch.text.x)) + 1))
    jax.eval_shape(lambda: run.system.init(jax.random.key(0), spec))
  example = jax.tree.map(lambda a: a[:1], batch)
  found = jax.eval_shape(run.system.predict, run.params, example, run.extra)
  for name in outputs:
    if name not in found:
      raise types.UsageError(f"this model gives no {name!r}; it gives {', '.join(found)}.")


def predict(
  run: runs.Trained,
  batch: types.Batch,
  outputs: Sequence[str] = ("prediction",),
  *,
  batch_size: int = 128,
) -> dict[str, np.ndarray]:
  """What a trained model predicts of samples as they are: nothing more goes missing.

  Args:
    run: the model.
    batch: N samples, of `prepare` or of a dataset.
    outputs: entries of the system's predictions, as "feature", the fused representation [N, D].
    batch_size: most rows predicted at once; it does not change the result.

  Returns:
    The outputs: "prediction" is [N], or [N, C] logits.

  Raises:
    UsageError: if the model has no such output, or its BERT no such token.
  """
  check_run(run, batch, outputs)
  mask = masking.drop(run.reading.drop)
  whole = evaluate.Condition("rate", "0", lambda: mask, {})
  return {
    name: evaluate.make_grid(run.system, batch, [whole], [0], batch_size=batch_size, output=name)(
      run.params, run.extra
    )[0, 0]
    for name in outputs
  }


def columns(prediction: np.ndarray, classes: Sequence[str]) -> dict[str, np.ndarray]:
  """Predictions as columns of a table.

  Args:
    prediction: [N, ], or [N, C] logits.
    classes: C names.

  Returns:
    "prediction" [N], a number or the name of the likeliest class, and then "p_NAME" [N], the
    probability of each class.
  """
  if prediction.ndim == 1:
    return {"prediction": prediction}
  logits = prediction.astype(np.float64)
  share = np.exp(logits - logits.max(1, keepdims=True))
  share /= share.sum(1, keepdims=True)
  names = np.array(classes, object)[prediction.argmax(1)]
  return {"prediction": names, **{f"p_{name}": share[:, c] for c, name in enumerate(classes)}}
