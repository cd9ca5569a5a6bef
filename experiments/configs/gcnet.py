"""GCNet (Lian et al. 2022) with settings out of its published search.

python -m experiments.train --config=gcnet:mosi \
    --data_dir=data --workdir=runs/gcnet --method=spl --config.mask.name=gcnet \
    --missing_rate=0.5

A sample is a conversation, the utterances of one video. The authors search, for each dataset and
missing rate, h in 50, 100, 200, windows from 1 to 4, with and without attention over time.
"""

from . import common

# Per dataset, where they differ from the model's own.
MODEL = {
  "mosi": dict(),
  "mosei": dict(),
  "sims": dict(),
  "iemocap": dict(speakers=2),
}
# Conversations of a batch. The authors take 32, the rest of an epoch as well, which here is left
# out: MOSI has 52 to train on.
BATCH = {"mosi": 16}


def get_config(dataset: str = "mosi"):
  config = common.get_config(dataset)
  model = common.settings_for("gcnet", dataset, MODEL, sims_v2="sims")
  config.model = dict(name="gcnet", **model, bert=common.BERT)
  config.data.standardize = True  # ours: what is reconstructed counts in its own units
  config.train.batch_size = BATCH.get(dataset, 32)
  config.train.epochs = 100
  config.train.patience = 20  # ours: theirs run to the end
  config.optimizer = dict(
    name="adam",
    learning_rate=1e-3,
    weight_decay=1e-5,
    groups=(("/bert/", dict(learning_rate=5e-5)),),  # ours: theirs reads features
  )
  config.method.optimizer.learning_rate = 1e-3
  return config
