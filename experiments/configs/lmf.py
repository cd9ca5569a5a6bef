"""LMF (Liu et al. 2018) with MMSA's hyperparameters.

python -m experiments.train --config=lmf:mosi \
    --data_dir=data --workdir=runs/lmf --method=m3s --missing_rate=0.4,0.6
"""

from . import common

# MMSA's settings per dataset, where they differ from the model's own: MOSI's.
MODEL = {
  "mosi": dict(),
  "mosei": dict(rank=4, input_dropout=(0.2, 0.2)),
  "sims": dict(hidden_sizes=(64, 16, 64), rank=4, input_dropout=(0.2, 0.2)),
  "sims_v2": dict(hidden_sizes=(64, 32, 64), rank=4),
}
# Batch size, learning rate, that of the factors, weight decay.
TRAIN = {
  "mosi": (64, 1e-3, 1e-3, 5e-3),
  "mosei": (32, 1e-3, 1e-3, 1e-3),
  "sims": (64, 2e-3, 5e-4, 5e-3),
  "sims_v2": (32, 2e-3, 5e-4, 1e-4),
}


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  config.model = dict(name="lmf", **common.settings_for("lmf", dataset, MODEL), bert=common.BERT)
  config.train.batch_size, rate, factors, decay = TRAIN.get(dataset, TRAIN["mosi"])
  config.train.epochs = 100
  config.train.patience = 8
  config.optimizer = dict(
    name="adam",
    learning_rate=rate,
    weight_decay=decay,
    groups=(
      ("_factor$", dict(learning_rate=factors)),
      ("^bert/", dict(learning_rate=5e-5)),  # ours: MMSA's reads features
    ),
  )
  config.method.optimizer.learning_rate = rate
  return config
