"""TETFN (Wang et al. 2023) with MMSA's hyperparameters.

python -m experiments.train --config=experiments/configs/tetfn.py:mosi \
    --data_dir=data --workdir=runs/tetfn --method=spl --missing_rate=0,1
"""

from experiments.configs import common


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  config.model = dict(
    name="tetfn",
    size=50,
    heads=5,
    lstm_sizes=(16, 64),  # of audio and vision
    kernel_sizes=(1, 1),
    attention_dropout=(0.1, 0.0, 0.1),
    relu_dropout=0.0,
    residual_dropout=0.1,
    embedding_dropout=0.0,
    head_sizes=(64, 32, 32, 16),  # of fusion, text, audio and vision
    head_dropout=(0.0, 0.0, 0.0, 0.0),
    bound=1.0 if dataset == "sims" else 3.0,
    exclude_zero=True,
  )
  config.model.bert = dict(folder="")  # of a BERT, where config.data.text is "tokens"
  config.train.batch_size = 64
  config.train.epochs = 100
  config.train.patience = 8
  config.optimizer = dict(
    name="adam",
    learning_rate=3e-4,
    weight_decay=1e-2,
    groups=(
      (r"^bert/.*(bias|norm/)", dict(learning_rate=3e-5, weight_decay=0.0)),
      ("^bert/", dict(learning_rate=3e-5, weight_decay=1e-3)),
      ("^audio_(rnn|conv)/", dict(learning_rate=5e-4)),
      ("^vision_(rnn|conv)/", dict(weight_decay=0.0)),
    ),
    accumulate=4,  # MMSA updates after every fourth batch
  )
  config.m3s.optimizer.learning_rate = 3e-4
  return config
