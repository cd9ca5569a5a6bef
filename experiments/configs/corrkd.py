"""CorrKD (re-implementation from descriptions; Li et al. 2024, CVPR), trained with HRLF's MSM.

python -m experiments.train --config=corrkd:mosi \
    --data_dir=data --workdir=runs/corrkd

Margins, rates, rows and epochs are what we know of the paper at second hand, unverified; the
teacher trains as long as the student (ours).
"""

from . import common

# What `experiments.ablate` changes.
ABLATIONS = {
  "components": {
    "w/o SCD": {"model.scd_weight": 0.0},
    "w/o CPD": {"model.cpd_weight": 0.0},
    "RCD as KL": {"model.response": "kl"},
  },
}
# heads, margin, epochs of a phase, learning rate, batch size
SETTINGS = {
  "mosi": (10, 1.2, 50, 4e-3, 64),
  "mosei": (8, 1.0, 20, 2e-3, 32),
  "iemocap": (10, 1.4, 30, 4e-3, 64),
}


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  heads, margin, epochs, rate, rows = common.settings_for("corrkd", dataset, SETTINGS)
  config.model = dict(
    name="corrkd", heads=heads, margin=margin, teacher_epochs=epochs, bert=common.BERT
  )
  config.train.batch_size = rows
  config.train.epochs = 2 * epochs
  config.train.patience = 0
  config.optimizer = dict(name="adam", learning_rate=rate)
  config.mask = dict(name="msm", drop=())
  config.method = dict(name="spl")
  return config
