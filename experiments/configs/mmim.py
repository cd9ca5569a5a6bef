"""MMIM (Han et al. 2021) with the hyperparameters of M³S §4.4 and MMSA.

python -m experiments.train --config=mmim:mosi \
    --data_dir=data --workdir=runs/mmim --method=m3s --missing_rate=0.4,0.6
"""

from . import common

MI_SHARE = {"mosi": 1.0, "mosei": 0.5, "sims": 1.0}


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  # "first" is the published [CLS]; precomputed states of it have read the missing words
  config.model = dict(
    name="mmim",
    pooling="mean",
    mi_share=common.settings_for("mmim", dataset, MI_SHARE, sims_v2="sims"),
    bert=common.BERT,
  )
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
  config.method.optimizer = dict(
    name="sgd", learning_rate=1e-3, groups=(("^bert/", dict(learning_rate=5e-5)),)
  )
  return config
