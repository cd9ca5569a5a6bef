"""CubeMLP (Sun et al. 2022) with its authors' hyperparameters.

python -m experiments.train --config=cubemlp:mosi \
    --data_dir=data --workdir=runs/cubemlp --method=m3s --missing_rate=0.4,0.6

Audio and vision that are not aligned to words need `--config.model.pack=own`.
"""

from . import common

# The authors' settings per dataset, where they differ from the model's own: MOSI's.
MODEL = {"mosi": dict()}
RATE = 4e-3


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  config.model = dict(
    name="cubemlp", **common.settings_for("cubemlp", dataset, MODEL), bert=common.BERT
  )
  config.train.batch_size = 128
  config.train.epochs = 70
  # after 60 of 70 epochs a tenth
  rate = dict(name="step", peak=RATE, every=60 / 70)
  config.optimizer = dict(
    name="adam",
    learning_rate=rate,
    clip_value=1.0,
    groups=(("^bert/", dict(learning_rate=dict(rate, peak=0.01 * RATE))),),
  )
  config.method.optimizer.learning_rate = RATE
  return config
