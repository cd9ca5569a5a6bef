"""What all configs share: the data, the training loop, the missing data and the method."""

import sys
from collections.abc import Mapping
from typing import Any

import ml_collections

# Datasets whose labels are classes; every other one is regression.
CLASSIFICATION = ("iemocap", "planted_emotions")
BERT = dict(folder="")  # of a BERT's files, where config.data.text is "tokens"
# Sets of changes that `experiments.ablate` can make to every model: LNLN's Table 6, and the method
# under a protocol that has another.
ABLATIONS = {
  "m3s": {"in M³S": {"method.name": "m3s"}},
  "modalities": {
    "w/o language": {"mask.drop": ("text",)},
    "w/o audio": {"mask.drop": ("audio",)},
    "w/o vision": {"mask.drop": ("vision",)},
  },
}


def get_config(dataset: str) -> Any:
  """The settings that every model's config starts from.

  `model`, `mask` and `method` name a factory, registered or your own `package.module:attribute`,
  and hold what differs from its defaults.

  Args:
    dataset: name under which the data were converted, such as "mosi".

  Returns:
    The ConfigDict; any entry is a flag, `--config.train.epochs=3`.
  """
  config = ml_collections.ConfigDict()
  config.seed = 0  # of everything random in the run
  config.data = dict(
    name=dataset,
    text="features",  # "features": precomputed; "tokens": raw ids through a BERT
    # "binary": IEMOCAP's emotions, each a problem of its own
    task="classification" if dataset in CLASSIFICATION else "regression",
    stream=False,  # leave the training split on disk, for data larger than the memory
    standardize=False,  # audio and vision by the training split's mean and std
  )
  config.train = dict(
    batch_size=128,
    epochs=100,
    patience=20,  # epochs without a better validation; 0 never stops early
    # "split/metric" that picks the epoch, the task's own on validation if empty; "test/mae" picks
    # each metric's own epoch by the test split, as published LNLN: an oracle and no result
    select="",
    precision="float32",  # or "bfloat16", what networks compute in; parameters stay in float32
    log_test=False,  # log the test split's metrics too, for figures; they select nothing
  )
  config.optimizer = dict(name="adam", learning_rate=1e-4)
  config.mask = dict(
    name="span",  # M³S's; "bernoulli" is LNLN's
    rate=(0.4, 0.6),  # lowest and highest missing rate, in training and validation
    drop=(),  # modalities that are never seen, in training and testing
  )
  # what replaces the mask's entries in validation and testing, where it takes them
  config.valid = dict(complete_share=0.0)
  config.method = dict(name="m3s", optimizer=dict(name="sgd", learning_rate=1e-4))
  return config


def settings_for(
  model: str, dataset: str, table: Mapping[str, Any], default: str = "mosi", **alike: str
) -> Any:
  """A dataset's row of a table of settings; says so where another dataset's have to do.

  Args:
    model: name of the config.
    dataset: the dataset.
    table: the settings by dataset.
    default: the row of a dataset that is not known.
    **alike: dataset -> the row of another one that serves it.

  Returns:
    The row.
  """
  if dataset in table:
    return table[dataset]
  row = alike.get(dataset, default)
  print(
    f"note: config {model} has no settings of its own for {dataset!r}; {row.upper()}'s are used.",
    file=sys.stderr,
  )
  return table[row]


def epoch_warmup(config: Any, peak: float, **settings) -> Any:
  """An optimizer whose rate moves once an epoch, as ALMT's and LNLN's: a rise, then a cosine."""
  epochs = config.train.get_ref("epochs")  # follows `--config.train.epochs`
  rate = ml_collections.ConfigDict(dict(name="epoch_warmup_cosine", peak=peak, warmup=0.1))
  rate.epochs = epochs
  return ml_collections.ConfigDict(dict(learning_rate=rate, **settings))
