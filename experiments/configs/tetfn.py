"""TETFN (Wang et al. 2023) with MMSA's hyperparameters.

python -m experiments.train --config=tetfn:mosi \
    --data_dir=data --workdir=runs/tetfn --method=spl --missing_rate=0,1
"""

from . import common

# What differs from the model's own settings: MMSA's for MOSI. Pairs are of audio and vision, fours
# of the heads: fusion, text, audio, vision.
MODEL = {
  "mosi": dict(),
  "sims": dict(bound=1.0),
  "sims_v2": dict(
    lstm_sizes=(16, 32), head_sizes=(128, 64, 16, 32), head_dropout=(0.1, 0.1, 0.0, 0.0)
  ),
}
# Learning rate and weight decay of the parts.
MOSI = dict(
  bert=dict(learning_rate=3e-5, weight_decay=1e-3),
  audio=dict(learning_rate=5e-4),
  vision=dict(weight_decay=0.0),
  other=dict(learning_rate=3e-4, weight_decay=1e-2),
)
SIMS_V2 = dict(
  bert=dict(learning_rate=5e-6, weight_decay=1e-3),
  audio=dict(learning_rate=5e-4),
  vision=dict(learning_rate=5e-3),
  other=dict(learning_rate=3e-4, weight_decay=1e-3),
)


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  config.model = dict(
    name="tetfn", **common.settings_for("tetfn", dataset, MODEL), bert=common.BERT
  )
  config.train.batch_size = 64
  config.train.epochs = 100
  config.train.patience = 8
  rates = SIMS_V2 if dataset == "sims_v2" else MOSI
  config.optimizer = dict(
    name="adam",
    groups=(
      (r"^bert/.*(bias|norm/)", {**rates["bert"], "weight_decay": 0.0}),
      ("^bert/", rates["bert"]),
      ("^audio_(rnn|conv)/", rates["audio"]),
      ("^vision_(rnn|conv)/", rates["vision"]),
    ),
    accumulate=4,  # MMSA updates after every fourth batch
    **rates["other"],
  )
  config.method.optimizer.learning_rate = 3e-4
  return config
