"""ALMT (Zhang et al. 2023) with MMSA's hyperparameters.

python -m experiments.train --config=experiments/configs/almt.py:mosi \
    --data_dir=data --workdir=runs/almt --method=spl --missing_rate=0,1
"""

from experiments.configs import common

FUSION_DEPTH = {"mosei": 4}


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  config.model = dict(
    name="almt",
    size=128,
    hidden_size=128,
    tokens=8,
    embedding_depth=1,
    embedding_heads=8,
    text_heads=8,
    hyper_depth=3,
    hyper_heads=8,
    fusion_hidden_size=128,
    fusion_depth=FUSION_DEPTH.get(dataset, 2),
    fusion_heads=8,
  )
  config.model.bert = dict(folder="")  # of a BERT, where config.data.text is "tokens"
  config.train.batch_size = 64
  config.train.epochs = 200
  config.train.patience = 32
  config.optimizer = common.epoch_warmup(config, 1e-4, name="adamw", weight_decay=1e-4)
  config.m3s.optimizer.learning_rate = 1e-4
  return config
