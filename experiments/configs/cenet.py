"""CENET (Wang et al. 2023) with MMSA's hyperparameters.

python -m experiments.train --config=cenet:mosi \
    --data_dir=data --workdir=runs/cenet --method=spl --missing_rate=0,1
"""

from . import common

# MMSA's settings per dataset.
OPTIMIZER = {
  "mosi": dict(learning_rate=1e-5, weight_decay=1e-4, eps=3e-8),
  "mosei": dict(learning_rate=1e-5, weight_decay=1e-4, eps=1e-8),
  "sims": dict(learning_rate=2e-6, weight_decay=0.0, eps=2e-8),
  "sims_v2": dict(learning_rate=3e-5, weight_decay=0.0, eps=3e-8),
}
NO_DECAY = (r"^bert/.*(bias|scale)$|^head_\d/bias$", dict(weight_decay=0.0))


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  config.model = dict(name="cenet", bert=common.BERT)
  config.train.batch_size = 32 if dataset == "sims" else 64
  config.train.epochs = 100
  config.train.patience = 8
  settings = common.settings_for("cenet", dataset, OPTIMIZER)
  config.optimizer = dict(name="adam", clip_norm=2.0, groups=(NO_DECAY,), **settings)
  config.method.optimizer.learning_rate = settings["learning_rate"]
  return config
