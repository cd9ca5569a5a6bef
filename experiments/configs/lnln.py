"""LNLN (Zhang, Wang & Yu 2024) with the authors' hyperparameters.

python -m experiments.train --config=lnln:mosi \
    --data_dir=data --workdir=runs/lnln --method=spl --missing_rate=0,1
"""

from . import common

# What `experiments.ablate` changes: Tables 4, 5 and 7 of the paper, and what its equations say
# where the authors' code says otherwise.
ABLATIONS = {
  "components": {
    "w/o DMC & Reconstructor": {"model.correction": False, "model.reconstruction": False},
    "w/o DMC": {"model.correction": False},
    "w/o Reconstructor": {"model.reconstruction": False},
    "w/o DMML": {"model.hyper_learning": False},
    "w/o Missing Data for Training": {"mask.rate": (0.0, 0.0)},
  },
  "regularization": {
    "w/o l_cc": {"model.completeness_weight": 0.0},
    "w/o l_adv": {"model.adversarial_weight": 0.0},
    "w/o l_rec": {"model.reconstruction_weight": 0.0},
  },
  "weights": {
    f"{name}={value}": {f"model.{entry}_weight": value}
    for name, entry, values in (
      ("gamma", "reconstruction", (0.0, 0.2)),
      ("beta", "adversarial", (0.0, 0.3, 0.5, 1.0)),
      ("alpha", "completeness", (0.0, 0.5, 1.0)),
    )
    for value in values
  },
  "equations": {
    "with the paper's reversal": {"model.reversal": "discriminator"},
    "with the paper's proxy": {"model.proxy": "learned"},
  },
}
ADVERSARIAL_WEIGHT = {"mosi": 0.8, "mosei": 0.8, "sims": 0.6}


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  weight = common.settings_for("lnln", dataset, ADVERSARIAL_WEIGHT, sims_v2="sims")
  config.model = dict(name="lnln", adversarial_weight=weight, bert=common.BERT)
  # complete_share: how many samples' modalities stay complete in training
  config.mask = dict(name="bernoulli", rate=(0.4, 0.6), complete_share=0.5, drop=())
  config.train.batch_size = 64
  config.train.epochs = 200
  config.train.patience = 32
  config.optimizer = common.epoch_warmup(config, 1e-4, name="adamw", weight_decay=1e-4)
  config.method.optimizer.learning_rate = 1e-4
  return config
