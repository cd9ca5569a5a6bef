"""TFR-Net (Yuan et al. 2021) with MMSA's hyperparameters.

python -m experiments.train --config=tfr_net:mosi \
    --data_dir=data --workdir=runs/tfr_net --method=spl --missing_rate=0,1
"""

from . import common

MODEL = {"mosi": dict()}  # the model's own settings are MMSA's for MOSI


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  config.model = dict(
    name="tfr_net", **common.settings_for("tfr_net", dataset, MODEL), bert=common.BERT
  )
  config.mask.name = "bernoulli"
  config.train.batch_size = 24
  config.train.epochs = 100
  config.train.patience = 6
  config.optimizer = dict(
    name="adam",
    learning_rate=1e-3,
    weight_decay=1e-3,
    clip_value=0.8,
    groups=(
      (r"^text/bert/.*(bias|norm/)", dict(learning_rate=2e-6, weight_decay=0.0)),
      ("^text/bert/", dict(learning_rate=2e-6, weight_decay=1e-4)),
    ),
    plateau=dict(patience=5, factor=0.1),
  )
  config.method.optimizer.learning_rate = 1e-3
  return config
