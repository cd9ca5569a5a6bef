"""What the words of the report mean; a page explains those that occur in it."""

import re
from collections.abc import Iterable

from mmjax import metrics

# By the metric's name; F1 of a class or of a problem by "f1_".
METRICS = {
  "mae": "Mean absolute error: how far predictions lie from the labels on average.",
  "corr": "Pearson's correlation of predictions and labels; 0 for a constant.",
  "acc2_non0": "Share of right signs, negative against positive; utterances labelled 0 left out.",
  "acc2_has0": "Share of right answers, negative against non-negative, all utterances.",
  "acc2": "Share of right answers, up to 0 against above.",
  "acc3": "Accuracy in three classes.",
  "acc5": "Accuracy in five classes.",
  "acc7": "Accuracy in seven classes: labels and predictions clipped to ±3 and rounded.",
  "acc": "Share of utterances whose class is right.",
  "uar": "Unweighted average recall: the mean over the classes of the share that was found.",
  "f1_non0": "F1 of negative against positive, weighted by their sizes; labels of 0 left out.",
  "f1_has0": "F1 of negative against non-negative, weighted by the classes' sizes.",
  "f1": "F1, the harmonic mean of precision and recall, weighted by the classes' sizes.",
  "f1_": "F1 of this class or problem.",
  "train_loss": "What training minimizes; of different systems it is not comparable.",
}
SWAPPED = (
  " Swapped: with labels and predictions exchanged, as an earlier version of LNLN's code had it;"
  " to compare with its published values only."
)
TERMS = {
  "± ": "Standard deviation over training seeds (in tables by condition: over trainings and test"
  " masks).",
  "n": "How many values a mean is over.",
  "p": "Welch's two-tailed t-test over the training seeds: how likely a difference at least as"
  " large is between systems that are alike. With fewer than five seeds it says little.",
  "Holm": "Holm's correction of p for how many systems are compared.",
  "constant": "“median” and “majority” are the best answers that need no input: the median or the"
  " most frequent class of the training labels. A system that does not beat it learnt nothing.",
  "missing": "Sets of missing modalities, by letters: l language (text), a audio, v vision; “la”"
  " leaves vision alone.",
  "available": "{l,a}: what is left; everything else is missing.",
  "area": "Area under the curve over the missing rate, divided by the rates' range: a mean.",
  "Δ": "Difference from the baseline.",
  "selection": "What picked the epoch of a training that is tested. The test split never does,"
  " unless TEST ORACLE is said.",
  "flip": "An answer that changes as data go missing, compared with the first column's.",
  "laziness": "Whether a system ends up with one answer for all: the largest share is that of its"
  " most frequent answer, the entropy (in nats) is 0 when there is one answer only.",
}


def metric(name: str) -> str:
  """What a metric means, "" if it is none of ours."""
  bare = name.removesuffix("_swapped")
  found = METRICS.get(bare) or (METRICS["f1_"] if re.match("f1_", bare) else "")
  return found + (SWAPPED if found and bare != name else "")


def entries(names: Iterable[str], text: str) -> dict[str, str]:
  """Term -> meaning.

  Args:
    names: the page's metrics.
    text: all of the page, in which terms are looked for.

  Returns:
    The metrics' titles and the terms that occur.
  """
  found = {_title(name): told for name in names if (told := metric(name))}
  where = {
    "± ": "±",
    "p": "p = |p&lt;|>p ",
    "n": ">n<",
    "Holm": "Holm",
    "constant": "median|majority",
    "missing": "issing modalit",
    "available": r"\{l\}",
    "area": ">area ",
    "Δ": "Δ",
    "selection": "epoch",
    "flip": "flip",
    "laziness": "largest share",
  }
  found |= {term: TERMS[term] for term, sign in where.items() if re.search(sign, text)}
  return found


def _title(name: str) -> str:
  return metrics.info(name).title
