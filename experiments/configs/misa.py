"""MISA (Hazarika et al. 2020) with the hyperparameters of M³S §4.4 and MMSA.

python -m experiments.train --config=misa:mosi \
    --data_dir=data --workdir=runs/misa --method=m3s --missing_rate=0.4,0.6
"""

from . import common

# MMSA's regression settings per dataset, where they differ from the model's own: MOSI's.
MODEL = {
  "mosi": dict(),
  "mosei": dict(dropout=0.5, diff_weight=0.3, sim_weight=0.8),
  "sims": dict(dropout=0.0, diff_weight=0.3, sim_weight=1.0, recon_weight=0.8),
  "sims_v2": dict(hidden_size=64, dropout=0.5, diff_weight=0.5, sim_weight=1.0, recon_weight=0.5),
}


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  config.model = dict(name="misa", **common.settings_for("misa", dataset, MODEL), bert=common.BERT)
  config.train.batch_size = 128
  config.train.epochs = 500
  config.train.patience = 20
  config.optimizer = dict(
    name="adam",
    learning_rate=1e-4,
    weight_decay=0.0,
    clip_value=1.0 if dataset == "sims" else 0.8,
  )
  config.method.optimizer.learning_rate = 1e-4
  return config
