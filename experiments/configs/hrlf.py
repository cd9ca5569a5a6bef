"""HRLF (Li et al. 2024) with the paper's hyperparameters (§4.2) and its training mask, MSM.

python -m experiments.train --config=hrlf:mosi \
    --data_dir=data --workdir=runs/hrlf

The teacher trains as long as the student; the paper does not say how long it does.
"""

import ml_collections

from . import common

PARTS = {
  part: {f"w/o {part.upper()}": {f"model.{part}_weight": 0.0}}
  for part in ("frf", "hmi", "hal", "kl")
}
# What `experiments.ablate` changes: Table 3 of the paper, and its loss on the outputs.
ABLATIONS = {
  **PARTS,
  "components": {name: changes for part in PARTS.values() for name, changes in part.items()},
}
# heads, epochs of a phase, learning rate, batch size
SETTINGS = {
  "mosi": (10, 50, 1e-3, 128),
  "mosei": (8, 20, 2e-3, 16),
  "iemocap": (10, 30, 4e-3, 32),
}


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  heads, epochs, rate, rows = common.settings_for("hrlf", dataset, SETTINGS)
  optimizer = ml_collections.ConfigDict(dict(name="adam", learning_rate=rate))
  config.optimizer = optimizer
  config.model = dict(
    name="hrlf",
    heads=heads,
    teacher_epochs=epochs,
    discriminator_rate=optimizer.get_ref("learning_rate"),  # follows it
    bert=common.BERT,
  )
  config.train.batch_size = rows
  config.train.epochs = 2 * epochs
  config.train.patience = 0
  config.mask = dict(name="msm", drop=())
  config.method = dict(name="spl")
  return config
