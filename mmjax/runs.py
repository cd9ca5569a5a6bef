"""The folder of a trained run, read without the data that it was trained on: `mmjax.load`.

`experiments.workdir` writes it. Two of its files say what a prediction needs: `config.json` the
whole run, `spec.json` what the data were like. The selected epochs are in its newest checkpoint.
"""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmjax import bert, checkpoint, conversations, data, models, types

FORMAT = 2  # of the folder
_SPEC = "spec.json"

Path = str | os.PathLike


class RunError(types.UsageError):
  """The folder does not hold the run that is asked for, or cannot serve it."""


class Reading(NamedTuple):
  """How a run reads data and what it writes, as its folder keeps it.

  Attributes:
    spec: of the data that it was trained on.
    moments: what audio and vision are standardized by, or nothing.
    classes: names of the classes, or nothing (regression).
    drop: modalities that are never seen.
    select: "split/metric" names that picked the epochs; the first one's counts.
    bert: the sizes of a BERT that came from a folder, which is not needed any more; or nothing.
    turns: utterances of the longest conversation of the training; 0: it reads no conversations.
    speakers: who speaks in the conversations.
  """

  spec: types.Spec
  moments: data.Moments
  classes: tuple[str, ...]
  drop: tuple[str, ...]
  select: tuple[str, ...]
  bert: Mapping[str, Any]
  turns: int = 0
  speakers: tuple[str, ...] = ()


class Trained(NamedTuple):
  """A trained model.

  Attributes:
    system: the model.
    params, extra: of the selected epoch; `system.predict(params, batch, extra)`.
    spec: of the data.
    reading: how files become batches, and what predictions mean.
    epoch, score: the selected epoch, and its value of `reading.select[0]`.
  """

  system: types.System
  params: types.Params
  extra: types.Extra
  spec: types.Spec
  reading: Reading
  epoch: int
  score: float


def read_config(path: Path) -> dict[str, Any]:
  """What the run in a folder was asked for ("run": "config", "data"), with what, on which data.

  Raises:
    RunError: if there is no run, or one of an older format.
  """
  file = pathlib.Path(path) / "config.json"
  try:
    found = json.loads(file.read_text(encoding="utf-8"))
  except (FileNotFoundError, NotADirectoryError):
    raise RunError(
      f"{file} does not exist: {path} holds no training run. Train one with"
      " `mmjax-train --workdir=…`."
    ) from None
  except json.JSONDecodeError as error:
    raise RunError(f"{file} is damaged ({error}); delete {path}.") from None
  if found.get("format") != FORMAT:
    raise RunError(
      f"{path} was written in an older format (1, this is {FORMAT}): choose another folder or"
      " train it again."
    )
  return found


def reading_of(
  dataset: data.Dataset, model: Mapping[str, Any], drop: Sequence[str], select: Sequence[str]
) -> Reading:
  """How a run reads data.

  Args:
    dataset: that it trains on, grouped if it reads conversations.
    model: the config's section.
    drop: modalities that it never sees.
    select: of the recipe.
  """
  given = model.get("bert") or {}
  sizes = {}
  if given.get("folder"):
    sizes = {**bert.setup(given).config._asdict(), "from_scratch": True}
  count = dataset.spec.num_classes
  names = _answers(dataset.spec.problems) or dataset.classes
  named = names if len(names) == count else map(str, range(count))
  found = Reading(dataset.spec, dataset.moments, tuple(named), tuple(drop), tuple(select), sizes)
  if isinstance(dataset.train, types.Batch) and conversations.is_grouped(dataset.train):
    turns, speakers = dataset.train.info["turn"], conversations.speakers(dataset.ids)
    found = found._replace(turns=int(turns.max()) + 1, speakers=tuple(speakers))
  return found


def _answers(problems: Sequence[str]) -> tuple[str, ...]:
  """All answers to binary problems, "happy+sad" or "none", in `data.read_labels` order."""
  if not problems:
    return ()
  answers = range(2 ** len(problems))
  return tuple(
    "+".join(name for k, name in enumerate(problems) if answer >> k & 1) or "none"
    for answer in answers
  )


def write_reading(path: Path, reading: Reading) -> None:
  """Keeps it in a run's folder."""
  spec = reading.spec._asdict()
  spec |= {name: spec[name]._asdict() for name in types.MODALITIES}
  moments = {m: [part.tolist() for part in parts] for m, parts in reading.moments.items()}
  text = json.dumps({**reading._asdict(), "spec": spec, "moments": moments})
  file = pathlib.Path(path) / _SPEC
  draft = file.with_suffix(".json.part")
  draft.write_text(text + "\n", encoding="utf-8")
  draft.replace(file)


def read_reading(path: Path) -> Reading:
  """How the run in a folder reads data.

  Raises:
    RunError: if there is no run, or one that kept no spec.
  """
  read_config(path)
  file = pathlib.Path(path) / _SPEC
  try:
    found = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise RunError(
      f"{file} does not exist: an older version began this run. `mmjax-train --workdir={path}`"
      " writes it, where the data are; what is trained is not trained again."
    ) from None
  except json.JSONDecodeError as error:
    raise RunError(f"{file} is damaged ({error}); `mmjax-train` writes it anew.") from None
  tuples = lambda value: tuple(value) if isinstance(value, list) else value  # noqa: E731 - of JSON
  spec: dict[str, Any] = {name: tuples(value) for name, value in found["spec"].items()}
  spec |= {name: types.ModalitySpec(**spec[name]) for name in types.MODALITIES}
  moments = {m: data.as_moments(*parts) for m, parts in found["moments"].items()}
  lists = {name: tuple(found[name]) for name in ("classes", "drop", "select", "speakers")}
  return Reading(types.Spec(**spec), moments, bert=found["bert"], turns=found["turns"], **lists)


def read_best(path: Path, template: Mapping[str, Any]) -> dict[str, Any]:
  """The selected epochs in the newest checkpoint of a run; a training there is not disturbed.

  Args:
    path: the run's folder.
    template: "split/metric" names -> shapes of a `train.Best`, or of parts of it as a dict.

  Returns:
    The arrays in their places.

  Raises:
    RunError: if there is no checkpoint yet.
  """
  folder = pathlib.Path(path) / "checkpoints"
  found = None
  if folder.exists():
    checkpoints = checkpoint.manager(folder)
    found = checkpoint.restore(checkpoints, {"best": dict(template)}, partial=True)
    checkpoints.close()
  if found is None:
    raise RunError(f"{path} holds no checkpoint yet.")
  return found["best"]


def load(path: Path) -> Trained:
  """The trained model in a run's folder, without its data; `mmjax.load`.

  Args:
    path: the folder that `experiments.train` wrote. It may have moved, and the data and the folder
      of a BERT's weights may be gone. A model of your own must be importable.

  Returns:
    The model at its selected epoch, so far, where the training is not over.

  Raises:
    RunError: if there is no run, no spec (an older version's), or no checkpoint.
  """
  reading = read_reading(path)
  given = _tuples(read_config(path)["run"]["config"]["model"])
  if reading.bert:
    given["bert"] = dict(reading.bert)
  system = models.make(**given)
  params, extra = jax.eval_shape(lambda: system.init(jax.random.key(0), reading.spec))
  part = {"score": np.float32(0), "epoch": np.int32(0), "params": params, "extra": extra}
  name = reading.select[0]
  best = jax.tree.map(jnp.asarray, read_best(path, {name: part})[name])
  return Trained(
    system,
    best["params"],
    best["extra"],
    reading.spec,
    reading,
    int(best["epoch"]),
    float(best["score"]),
  )


def _tuples(tree: Any) -> Any:
  """Settings that were written as JSON, where every tuple is a list."""
  if isinstance(tree, Mapping):
    return {key: _tuples(value) for key, value in tree.items()}
  return tuple(map(_tuples, tree)) if isinstance(tree, list) else tree
