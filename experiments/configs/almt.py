"""ALMT (Zhang et al. 2023) with MMSA's hyperparameters.

python -m experiments.train --config=almt:mosi \
    --data_dir=data --workdir=runs/almt --method=spl --missing_rate=0,1
"""

from . import common

FUSION_DEPTH = {"mosi": 2, "mosei": 4, "sims": 2}


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  depth = common.settings_for("almt", dataset, FUSION_DEPTH, sims_v2="sims")
  config.model = dict(name="almt", fusion_depth=depth, bert=common.BERT)
  config.train.batch_size = 64
  config.train.epochs = 200
  config.train.patience = 32
  config.optimizer = common.epoch_warmup(config, 1e-4, name="adamw", weight_decay=1e-4)
  config.method.optimizer.learning_rate = 1e-4
  return config
