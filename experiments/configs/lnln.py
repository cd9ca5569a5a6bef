"""LNLN (Zhang, Wang & Yu 2024) with the authors' hyperparameters.

python -m experiments.train --config=experiments/configs/lnln.py:mosi \
    --data_dir=data --workdir=runs/lnln --method=spl --missing_rate=0,1
"""

from experiments.configs import common

# What `experiments.ablate` changes: Tables 4, 5 and 7 of the paper, and what its equations say
# where the authors' code says otherwise.
ABLATIONS = {
  "components": {
    "w/o DMC & Reconstructor": {"model.correction": False, "model.reconstruction": False},
    "w/o DMC": {"model.correction": False},
    "w/o Reconstructor": {"model.reconstruction": False},
    "w/o DMML": {"model.hyper_learning": False},
    "w/o Missing Data for Training": {"missing_rate": 0},
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


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  config.model = dict(
    name="lnln",
    size=128,
    tokens=8,
    discriminator_size=64,
    depth=2,
    heads=8,
    hidden_size=128,
    hyper_depth=3,
    hyper_heads=8,
    completeness_weight=0.9,
    adversarial_weight=0.6 if dataset == "sims" else 0.8,
    reconstruction_weight=0.1,
    task_weight=1.0,
    # the parts of Tables 4 and 5
    correction=True,
    hyper_learning=True,
    reconstruction=True,
    # where code and paper differ, see mmjax/models/lnln.py
    reversal="proxy",
    proxy="generator",
  )
  config.model.bert = dict(folder="")  # of a BERT, where config.data.text is "tokens"
  config.mask.kind = "bernoulli"
  config.mask.complete_share = 0.5
  config.train.batch_size = 64
  config.train.epochs = 200
  config.train.patience = 32
  config.optimizer = common.epoch_warmup(config, 1e-4, name="adamw", weight_decay=1e-4)
  config.m3s.optimizer.learning_rate = 1e-4
  return config
