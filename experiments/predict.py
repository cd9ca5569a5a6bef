"""Predicts samples without labels with a trained run; the data of its training are not needed.

python -m experiments.predict --workdir=runs/misa-m3s --pickle=own.pkl --out=predictions.csv

The file is a pickle, .npz or .safetensors in the MMSA layout: several splits, one, or a single
sample, as MMSA-FET's run_single writes it. Each row of the table is a sample: its id, which
modalities were found of it, and the prediction, a number or the likeliest class with the
probabilities of all.
"""

from typing import Any

import numpy as np
from absl import flags

from mmjax import files, predict, runs, types

from . import cli, processes, samples

_FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of a training run.", flag_values=_FLAGS)
_PICKLE = flags.DEFINE_list("pickle", [], "The feature file, or several.", flag_values=_FLAGS)
_OUT = flags.DEFINE_string("out", "", "The table that is written, .csv.", flag_values=_FLAGS)
_FEATURES = flags.DEFINE_string(
  "features", None, "Also keep the fused representation, in this .npz.", flag_values=_FLAGS
)


@cli.binary(_FLAGS, __doc__, required=["workdir", "pickle", "out"])
def main():
  samples.check("out", _OUT.value, [".csv"])
  if _FEATURES.value:
    samples.check("features", _FEATURES.value, [".npz"])
  reading = runs.read_reading(_WORKDIR.value)
  found = files.read(_PICKLE.value)
  inputs = predict.prepare(found.content, found.name, reading)
  for note in found.notes + inputs.notes:
    cli.note(note)
  for m in reading.drop:
    cli.note(f"this run never sees {m}, whatever a file holds.")
  processes.cores_as_devices()
  run = runs.load(_WORKDIR.value)
  outputs = ("prediction", "feature") if _FEATURES.value else ("prediction",)
  found = predict.predict(run, inputs.batch, outputs)
  told: dict[str, Any] = {"id": inputs.ids}
  if any(inputs.splits):
    told["split"] = inputs.splits
  for m in types.MODALITIES:
    told[m] = np.where(inputs.found[m], "present", "missing")
  if _FEATURES.value:
    samples.write_npz(_FEATURES.value, {**{k: np.asarray(v) for k, v in told.items()}, **found})
  samples.write_csv(_OUT.value, {**told, **predict.columns(found["prediction"], reading.classes)})
  seen = ", ".join(f"{m} of {int(inputs.found[m].sum())}" for m in types.MODALITIES)
  print(f"{len(inputs.ids)} samples ({seen}), predicted by epoch {run.epoch}: {_OUT.value}")


if __name__ == "__main__":
  main()
