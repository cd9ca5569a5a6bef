"""DMD: decoupled multimodal distilling (Li, Wang & Cui 2023).

Each modality's sequence is split into a shared (homogeneous) and a private (heterogeneous) one.
The shared ones attend to themselves, the private ones to each other as in MulT, and all of them
are fused. Heads of single modalities learn the task beside, and distil into each other along a
graph whose edges are learned, one graph for the shared and one for the private representations.

Paper: https://arxiv.org/abs/2303.13802. Parity: the authors' implementation and its quirks.
"""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmjax import batched, crossmodal, layers, losses, systems, types
from mmjax import bert as bert_lib
from mmjax.models import mult

Array = types.Array
ORDER = ("text", "vision", "audio")  # of the graph's nodes and of what is concatenated
LETTERS = {name: mult.LETTERS[name] for name in ORDER}
EDGES = [(student, teacher) for student in range(3) for teacher in range(3) if student != teacher]
GRAPHS = ("homo", "hetero")
# Where the edges' weights are drawn to: softmax of this over 0.25.
PRIORS = {"homo": (0, 0, 1, 0, 1, 0), "hetero": (0, 0, 1, 0, 1, 1)}
COSINES = ("batch", "channels")


class Graph(nn.Module):
  """Weights of the six edges, by what the three modalities predict and represent.

  Attributes:
    size: width of each projection.
  """

  size: int

  @nn.compact
  def __call__(self, scores: Array, representations: Array) -> Array:
    """scores [3, B, C], representations [3, B, D] -> [6, B], in the order of `EDGES`."""
    z = [
      layers.Dense(self.size, name="W_logit")(scores),
      layers.Dense(self.size, name="W_repr")(representations),
    ]
    z = jnp.concatenate(z, -1)
    pairs = jnp.stack([jnp.concatenate([z[j], z[i]], -1) for j, i in EDGES])
    return jax.nn.softmax(layers.Dense(1, name="W_edge")(pairs)[..., 0] / 8, axis=0)


class Dmd(nn.Module):
  """The network. `__call__` returns every tensor that the losses need.

  Attributes:
    num_outputs: 1 for regression, else the number of classes.
    size: D, width of the sequences.
    heads: of all Transformers; they divide D.
    depth: layers of the Transformers; the memory's have at least 3.
    kernel_sizes: of the convolutions over text, audio, vision; each shortens its sequence.
    causal: as in `mult.Mult`.
    graph_sizes: width of the homogeneous and of the heterogeneous graph.
    text_dropout: of the text's states.
    attention_dropout: where the source is text, audio, vision; the first is the memory's too.
    relu_dropout, residual_dropout, embedding_dropout: of the Transformers.
    output_dropout: of the residual blocks' hidden layers.
    bert: for text as token ids, see `bert.setup`; BERT-base without weights by default.
  """

  num_outputs: int = 1
  size: int = 50
  heads: int = 10
  depth: int = 4
  kernel_sizes: Sequence[int] = (5, 5, 5)
  causal: bool = True
  graph_sizes: Sequence[int] = (64, 32)
  text_dropout: float = 0.5
  attention_dropout: Sequence[float] = (0.3, 0.2, 0.0)
  relu_dropout: float = 0.0
  residual_dropout: float = 0.0
  embedding_dropout: float = 0.2
  output_dropout: float = 0.5
  bert: bert_lib.Setup = bert_lib.setup(None)

  @nn.compact
  def __call__(self, batch: types.Batch) -> dict[str, Array]:
    x = mult.project(self, batch)
    out, private = {}, {}
    encode_shared = self._conv("shared")
    for name in ORDER:
      encode_private = self._conv(f"{name}_private")
      private[name], shared = encode_private(x[name]), encode_shared(x[name])
      restored = self._conv(f"{name}_decoder")(jnp.concatenate([private[name], shared], -1))
      out |= {f"origin_{name}": x[name], f"private_{name}": private[name]}
      out |= {f"shared_{name}": shared, f"restored_{name}": restored}
      out[f"cycle_{name}"] = encode_private(restored)
      # the published code flattens with the channels first here, and the steps first below
      by_channel, by_step = (
        y.reshape(y.shape[0], -1) for y in (jnp.swapaxes(shared, 1, 2), shared)
      )
      out[f"aligned_{name}"] = layers.Dense(self.size, name=f"{name}_align")(by_channel)
      # published beside the model, but in no loss
      flat = private[name].reshape(by_step.shape[0], -1)
      out[f"cosine_{name}"] = layers.Dense(self.size, name=f"{name}_cosine")(flat)
      low, out[f"repr_homo_{name}"] = self._residual(f"{name}_low", self.size)(by_step)
      out[f"scores_homo_{name}"] = self._scores(f"{name}_low_out", low)

    attended = batched.together(
      [mult.transformer(self, f"{m}_attention", self.depth, m, positions=True) for m in ORDER],
      [(out[f"shared_{m}"],) for m in ORDER],
    )
    out |= {f"attention_{m}": value for m, value in zip(ORDER, attended, strict=True)}
    common = jnp.concatenate([value[:, -1] for value in attended], -1)
    out["scores_common"] = self._scores("common_out", self._residual("common")(common)[0])

    out |= mult.exchange(self, private, positions=True)
    vectors = []
    for name in ORDER:
      high, _ = self._residual(f"{name}_high")(out[name])
      out[f"repr_hetero_{name}"] = high
      out[f"scores_hetero_{name}"] = self._scores(f"{name}_high_out", high)
      vectors.append(layers.Dense(2 * self.size, name=f"{name}_weight")(out[name]))
    vectors.append(layers.Dense(3 * self.size, name="common_weight")(common))
    feature = jax.nn.sigmoid(jnp.concatenate(vectors, -1))
    scores = self._scores("out_layer", self._residual("residual")(feature)[0])

    for kind, size in zip(GRAPHS, self.graph_sizes, strict=True):
      stacked = (jnp.stack([out[f"{w}_{kind}_{m}"] for m in ORDER]) for w in ("scores", "repr"))
      out[f"edges_{kind}"] = Graph(size, name=kind)(*stacked)
    return {**out, "scores": scores, "feature": feature, "prediction": layers.prediction(scores)}

  def _conv(self, name):
    return layers.Conv1d(self.size, 1, use_bias=False, name=name)

  def _residual(self, name, hidden=None):
    return mult.Residual(self.output_dropout, hidden, name=name)

  def _scores(self, name, x):
    return layers.Dense(self.num_outputs, name=name)(x)


def positive_cosine(x: Array, y: Array, axis: int = -1) -> Array:
  """Mean of max(0, cos(x, y)) over an axis: CosineEmbeddingLoss of pairs that shall differ."""
  squares = ((z * z).sum(axis) + 1e-12 for z in (x, y))
  product = next(squares) * next(squares)
  return jax.nn.relu((x * y).sum(axis) / jnp.sqrt(product)).mean()


def margin_loss(feature: Array, label: Array) -> Array:
  """Rows of equal labels shall be more alike than others, by more the further labels differ.

    max(0, 0.15 |y_i - y_n| - cos(i, p) + cos(i, n)), meant over all positives p and negatives n
    of an anchor i, and over the anchors that have both

  Args:
    feature: [N, D].
    label: [N] values, or classes, of which any two differ by 1.

  Returns:
    [] the loss; 0 without an anchor.
  """
  norm = jnp.sqrt((feature**2).sum(1) + 1e-8)
  cosine = feature @ feature.T / (norm[:, None] * norm[None])
  equal = label[:, None] == label[None]
  if jnp.issubdtype(label.dtype, jnp.floating):
    distance = jnp.abs(label[:, None] - label[None]).astype(cosine.dtype)
  else:
    distance = (~equal).astype(cosine.dtype)
  positive, negative = equal & ~jnp.eye(len(label), dtype=bool), ~equal
  hinge = jax.nn.relu((0.15 * distance + cosine)[:, None, :] - cosine[:, :, None])
  pairs = (positive[:, :, None] & negative[:, None, :]).astype(cosine.dtype)
  number = pairs.sum((1, 2))
  each = (hinge * pairs).sum((1, 2)) / jnp.maximum(number, 1)
  return each.sum() / jnp.maximum((number > 0).astype(cosine.dtype).sum(), 1)


def distillation(out: Mapping[str, Array], kind: str) -> dict[str, Array]:
  """Unweighted terms of a graph: teachers are detached, the edges are not.

  Args:
    out: of the network.
    kind: one of `GRAPHS`.

  Returns:
    "reg": Σ (mean edge - prior)²; "logit": Σ over the edges of mean(w |difference of scores|)
    with w = edge + prior; "repr": the same of representations if "homo", and of "hetero" ones
    mean(w) · mean(max(0, cosine)), which drives them apart.
  """
  scores, representations = (
    [out[f"{what}_{kind}_{name}"] for name in ORDER] for what in ("scores", "repr")
  )
  edges = out[f"edges_{kind}"]
  prior = jax.nn.softmax(jnp.asarray(PRIORS[kind], edges.dtype) / 0.25)

  def l1(pair, weight):
    return (weight * jnp.abs(pair[0] - pair[1]).sum(1)).mean()

  def opposed(pair, weight):
    return weight.mean() * positive_cosine(*pair)

  def over_edges(distance, x):
    terms = [
      distance((x[j], jax.lax.stop_gradient(x[i])), edges[n] + prior[n])
      for n, (j, i) in enumerate(EDGES)
    ]
    return jnp.stack(terms).sum()

  return {
    "reg": ((edges.mean(1) - prior) ** 2).sum(),
    "logit": over_edges(l1, scores),
    "repr": over_edges(l1 if kind == "homo" else opposed, representations),
  }


def loss_parts(out: Mapping[str, Array], label: Array, cosine: str = "batch") -> dict[str, Array]:
  """Every term of the loss by itself: sums over the modalities, and their summands "sum/part"."""
  tasks = {"all": "scores", "common": "scores_common"}
  tasks |= {f"{kind}_{name}": f"scores_{kind}_{name}" for kind in GRAPHS for name in ORDER}
  parts = {
    f"task/{part}": losses.task(layers.prediction(out[key]), label, "l1").mean()
    for part, key in tasks.items()
  }
  axis = 0 if cosine == "batch" else -1
  for name in ORDER:
    private, shared = out[f"private_{name}"], out[f"shared_{name}"]
    restored, origin = out[f"restored_{name}"], out[f"origin_{name}"]
    parts[f"recon/{name}"] = losses.reconstruction(restored, origin)
    parts[f"cycle/{name}"] = losses.reconstruction(out[f"cycle_{name}"], private)
    parts[f"ort/{name}"] = positive_cosine(private, shared, axis)
  for total in ("task", "recon", "cycle", "ort"):
    summands = [value for key, value in parts.items() if key.startswith(f"{total}/")]
    parts[total] = jnp.stack(summands).sum()
  aligned = jnp.concatenate([out[f"aligned_{name}"] for name in ORDER])
  parts["margin"] = margin_loss(aligned, jnp.concatenate([label] * len(ORDER)))
  for kind in GRAPHS:
    parts |= {f"{kind}/{term}": value for term, value in distillation(out, kind).items()}
  return parts


@systems.configurable(Dmd)
def make(
  network: Dmd,
  *,
  graph_weight: float = 0.05,
  homo_weights: Sequence[float] = (10.0, 1.0, 0.0),
  hetero_weights: Sequence[float] = (10.0, 1.0, 10.0),
  decoupling_weight: float = 0.1,
  margin_weight: float = 0.1,
  cosine: str = "batch",
) -> types.System:
  """DMD as a system; the defaults are the authors' for MOSI.

  Args:
    network: settings of `Dmd`.
    graph_weight: of both graphs' losses.
    homo_weights, hetero_weights: in them, of the edges' distance to the prior, the scores and
      the representations. The authors compute the homogeneous representations' and drop it.
    decoupling_weight: of reconstruction, cycle, and what follows.
    margin_weight: in it, of the margin loss and the orthogonality of private and shared.
    cosine: what the cosine of that orthogonality runs over: the "batch", as published, or the
      "channels".

  Returns:
    The system. Its one phase, "main", logs the parts task, recon, cycle, ort, margin, homo and
    hetero.
  """
  mult.check_width(network, positions=True)
  if cosine not in COSINES:
    raise ValueError(f"cosine is {cosine!r}, expected one of {COSINES}.")
  graph_weights = dict(zip(GRAPHS, (homo_weights, hetero_weights), strict=True))

  def loss(out, batch, extra):
    parts = loss_parts(out, batch.label, cosine)
    shown = {name: parts[name] for name in ("task", "recon", "cycle", "ort", "margin")}
    for kind, weights in graph_weights.items():
      terms = jnp.stack([parts[f"{kind}/{term}"] for term in ("reg", "logit", "repr")])
      shown[kind] = graph_weight * (jnp.asarray(weights, terms.dtype) * terms).sum()
    decoupling = parts["cycle"] + parts["recon"] + margin_weight * (parts["margin"] + parts["ort"])
    total = parts["task"] + shown["homo"] + shown["hetero"] + decoupling_weight * decoupling
    return total, types.Aux(shown, extra)

  return systems.supervised(network, loss, head="out_layer", hessian="symmetric")


def _rules():
  prefix = r"(?:dmd\.)?"
  yield from bert_lib.torch_rules(rf"{prefix}text_model\.model\.", "bert")
  yield from mult.exchange_rules(prefix)
  for name, m in LETTERS.items():
    yield from crossmodal.torch_rules(rf"{prefix}self_attentions_c_{m}", f"{name}_attention")
    yield rf"{prefix}encoder_s_{m}\.weight", f"{name}_private/weight"
    yield rf"{prefix}decoder_{m}\.weight", f"{name}_decoder/weight"
    yield rf"{prefix}proj_cosine_{m}\.(weight|bias)", rf"{name}_cosine/\1"
    yield rf"{prefix}align_c_{m}\.(weight|bias)", rf"{name}_align/\1"
    yield rf"{prefix}weight_{m}\.(weight|bias)", rf"{name}_weight/\1"
    yield rf"{prefix}(proj[12])_{m}_(low|high)\.(weight|bias)", rf"{name}_\2/\1/\3"
    yield rf"{prefix}out_layer_{m}_(low|high)\.(weight|bias)", rf"{name}_\1_out/\2"
  yield rf"{prefix}encoder_c\.weight", "shared/weight"
  yield rf"{prefix}weight_c\.(weight|bias)", r"common_weight/\1"
  yield rf"{prefix}(proj[12])_c\.(weight|bias)", r"common/\1/\2"
  yield rf"{prefix}out_layer_c\.(weight|bias)", r"common_out/\1"
  yield rf"{prefix}(proj[12])\.(weight|bias)", r"residual/\1/\2"
  yield rf"{prefix}out_layer\.(weight|bias)", r"out_layer/\1"
  yield r"(homo|hetero)\.(W_\w+)\.(weight|bias)", r"\1/\2/\3"


TORCH_RULES = tuple(_rules())
