"""MCTN (Pham et al. 2019) with MMSA's hyperparameters.

python -m experiments.train --config=mctn:mosi \
    --data_dir=data --workdir=runs/mctn --method=m3s --missing_rate=0.4,0.6

`--config.model.over=batch` is MMSA's published variant, see `mmjax/models/mctn.py`.
"""

from . import common

# MMSA's settings per dataset, where they differ from the model's own: MOSI's.
MODEL = {"mosi": dict()}


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  config.model = dict(name="mctn", **common.settings_for("mctn", dataset, MODEL), bert=common.BERT)
  config.train.batch_size = 32
  config.train.epochs = 200
  config.train.patience = 8
  config.optimizer = dict(name="adam", learning_rate=1e-4, clip_norm=1.0)
  config.method.optimizer.learning_rate = 1e-4
  return config
