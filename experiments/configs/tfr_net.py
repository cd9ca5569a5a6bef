"""TFR-Net (Yuan et al. 2021) with MMSA's hyperparameters.

python -m experiments.train --config=experiments/configs/tfr_net.py:mosi \
    --data_dir=data --workdir=runs/tfr_net --method=spl --missing_rate=0,1
"""

from experiments.configs import common


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  # threes are of text, audio and vision
  config.model = dict(
    name="tfr_net",
    size=30,
    heads=6,
    depth=3,
    memory_depth=3,
    temporal_heads=25,
    kernel_sizes=(1, 5, 3),
    gate_sizes=(36, 20, 48),
    gate_depth=3,
    hidden_size=128,
    text_dropout=0.2,
    attention_dropout=(0.2, 0.1, 0.0),
    transformer_dropout=0.2,
    gate_dropout=0.2,
    head_dropout=0.0,
    generation_weights=(5.0, 2.0, 20.0),
    similarity_weight=5.0,
  )
  config.model.bert = dict(folder="")  # of a BERT, where config.data.text is "tokens"
  config.mask.kind = "bernoulli"
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
  config.m3s.optimizer.learning_rate = 1e-3
  return config
