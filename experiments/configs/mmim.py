"""MMIM (Han et al. 2021) with the hyperparameters of M³S §4.4 and MMSA.

python -m experiments.train --config=experiments/configs/mmim.py:mosi \
    --data_dir=data --workdir=runs/mmim --method=m3s --missing_rate=0.4,0.6
"""

from experiments.configs import common


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  # "first" is the published [CLS]; precomputed states of it have read the missing words
  config.model = dict(
    name="mmim",
    pooling="mean",
    lstm_sizes=(16, 16),  # of audio and vision
    out_sizes=(16, 16),
    hidden_size=128,
    dropout=0.1,
    contrast_weight=0.1,
    mi_weight=0.1,
    memory_size=1,
    mi_share=0.5 if dataset == "mosei" else 1.0,
  )
  config.model.bert = dict(folder="")  # of a BERT, where config.data.text is "tokens"
  config.train.batch_size = 32
  config.train.epochs = 40
  config.train.patience = 0
  config.optimizer = dict(
    name="adam",
    learning_rate=1e-3,
    weight_decay=1e-4,
    clip_norm=1.0,
    groups=(("^bert/", dict(learning_rate=5e-5)),),
  )
  # only the main optimizer follows the validation
  config.phase_optimizer = dict(main=dict(plateau=dict(patience=20, factor=0.5)))
  config.m3s.optimizer = dict(
    name="sgd", learning_rate=1e-3, groups=(("^bert/", dict(learning_rate=5e-5)),)
  )
  return config
