"""Self-MM (Yu et al. 2021) with the hyperparameters of M³S §4.4 and MMSA.

python -m experiments.train --config=self_mm:sims \
    --data_dir=data --workdir=runs/self_mm --method=m3s --missing_rate=0.4,0.6
"""

from . import common

# MMSA's settings per dataset: of the model, where they differ from its own (MOSI's), and of the
# parts' optimizers. Pairs are of audio and vision, fours of the heads: fusion, text, audio, vision.
MODEL = {
  "mosi": dict(),
  "mosei": dict(head_dropout=(0.1, 0.0, 0.0, 0.0)),
  "sims": dict(lstm_sizes=(16, 64), head_dropout=(0.0, 0.1, 0.1, 0.1), bound=1.0),
  "sims_v2": dict(
    lstm_sizes=(16, 64), head_sizes=(128, 64, 32, 32), head_dropout=(0.0, 0.0, 0.1, 0.0)
  ),
}
AUDIO = {
  "mosi": dict(learning_rate=5e-3, weight_decay=1e-3),
  "mosei": dict(learning_rate=5e-3, weight_decay=0.0),
  "sims": dict(learning_rate=5e-3, weight_decay=1e-2),
  "sims_v2": dict(learning_rate=1e-3, weight_decay=0.0),
}
VISION = {**AUDIO, "mosei": dict(learning_rate=1e-4, weight_decay=0.0)}
OTHER = {"mosei": dict(weight_decay=1e-2)}
BERT_DECAY = {"sims_v2": 1e-2}


def get_config(dataset: str = "mosi"):
  model = common.settings_for("self_mm", dataset, MODEL)
  known = dataset if dataset in MODEL else "mosi"
  config = common.get_config(dataset)
  # "first" is the published [CLS]; precomputed states of it have read the missing words
  config.model = dict(name="self_mm", pooling="mean", **model, bert=common.BERT)
  config.train.batch_size = 32
  config.train.epochs = 100
  config.train.patience = 8
  rates = (("^audio_", AUDIO[known]), ("^vision_", VISION[known]))
  bert = (
    (r"^bert/.*(bias|norm/)", dict(learning_rate=5e-5, weight_decay=0.0)),
    ("^bert/", dict(learning_rate=5e-5, weight_decay=BERT_DECAY.get(known, 1e-3))),
  )
  config.optimizer = dict(
    name="adam",
    learning_rate=1e-3,
    weight_decay=1e-3,
    groups=bert + rates,
    accumulate=4,  # MMSA updates after every fourth batch
  )
  config.optimizer.update(OTHER.get(known, {}))
  config.method.optimizer = dict(
    name="sgd",
    learning_rate=1e-3,
    groups=(
      ("^bert/", dict(learning_rate=5e-5)),
      *((pattern, dict(learning_rate=group["learning_rate"])) for pattern, group in rates),
    ),
  )
  return config
