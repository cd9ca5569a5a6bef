"""HRLF: the hierarchical representation learning framework (Li et al. 2024).

A teacher learns from complete data, then a student of the same structure from what is observed.
Each modality becomes one vector, which two encoders factorize into a sentiment-relevant and a
modality-specific part (FRF): a decoder must restore any modality from its own specific part and
anybody's sentiment. A stack of layers refines the joint vector; at each of its three scales the
student's representation shares as much information as possible with the frozen teacher's (HMI)
and a discriminator cannot tell the two apart (HAL). The teacher's output is a target as well (KL).

Paper: https://arxiv.org/abs/2411.02793. The authors publish no code, and what the paper leaves
open is a setting of `Hrlf` or `make` here; "ours" says that a choice is not the paper's.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mmjax import bert as bert_lib
from mmjax import distill, layers, losses, masking, optim, systems, types

Array = types.Array
_DECODERS = tuple(f"decoder_{name}" for name in types.MODALITIES)
CHOICES = {
  "norm": distill.NORMS,
  "last": ("valid", "padded"),
  "decoder": ("shared", "per_modality"),
  "scale_merge": ("stack", "concat", "mean"),
  "negatives": distill.NEGATIVES,
  "adversary_kind": ("saturating", "nonsaturating"),
  "student_start": ("fresh", "teacher"),
}


class Hrlf(nn.Module):
  """The network, of the teacher and of the student alike.

  Sizes other than `size` and `heads` are ours.

  Attributes:
    num_outputs: 1 for regression, else the number of classes.
    size: d, width of a modality's vector; even, divisible by `heads`.
    heads: of the attention.
    depth: Transformer layers of each modality.
    feedforward: their hidden width; 0 is 4d.
    dropout: of the Transformers.
    norm: "pre" or "post": where the Transformers normalize.
    last: which step is a modality's vector: the last "valid" one, or the last one of the
      "padded" sequence.
    decoder: one for all modalities ("shared", as the paper writes it) or one "per_modality".
    bert: for text as token ids, see `bert.setup`; teacher and student have one each.
  """

  num_outputs: int = 1
  size: int = 40
  heads: int = 10
  depth: int = 2
  feedforward: int = 0
  dropout: float = 0.1
  norm: str = "pre"
  last: str = "valid"
  decoder: str = "shared"
  bert: bert_lib.Setup = bert_lib.setup(None)

  @nn.compact
  def __call__(self, batch: types.Batch, train: bool) -> dict[str, Array]:
    """`train` adds the translations, which only the losses need.

    Of n = 3 modalities: "z" [B, n, d]; "q" and "u" [B, n, d / 2]; "translated" [B, n, n, d],
    sentiment of the first index and specifics of the second; "requantified" [B, n, n, d / 2], the
    sentiment that is found in them. "scale_1" … "scale_5" are the refinement's input and outputs
    in order, [B, 3d], [B, 2d], [B, d], [B, 2d], [B, 3d]; "feature" is the last one.
    """
    size = self.size

    def factor(kind):
      return [distill.Mlp(size, size // 2, name=f"{kind}_{name}") for name in types.MODALITIES]

    vectors = [self._vector(name, batch) for name in types.MODALITIES]
    sentiment, specific = factor("sentiment"), factor("specific")
    z = jnp.stack(vectors, 1)
    q = jnp.stack([one(x) for one, x in zip(sentiment, vectors, strict=True)], 1)
    u = jnp.stack([one(x) for one, x in zip(specific, vectors, strict=True)], 1)
    x = jnp.concatenate([q, u], -1).reshape(z.shape[0], -1)  # C_m = [Q_m; U_m], one after the other
    out = {"z": z, "q": q, "u": u, "scale_1": x}
    for n, width in enumerate((2 * size, size, 2 * size, 3 * size), 2):
      x = layers.Dense(width, name=f"refine_{n - 1}")(x)
      x = out[f"scale_{n}"] = jax.nn.relu(x) if n < 5 else x
    out["feature"] = x
    out["prediction"] = layers.prediction(layers.Dense(self.num_outputs, name="head")(x))
    if train:
      names = ("decoder",) * 3 if self.decoder == "shared" else _DECODERS
      decoders = {name: distill.Mlp(2 * size, size, name=name) for name in dict.fromkeys(names)}
      translated, found = [], []
      for j, name in enumerate(names):  # into modality j, with everybody's sentiment
        other = jnp.broadcast_to(u[:, j, None], q.shape)
        translated.append(decoders[name](jnp.concatenate([q, other], -1)))
        found.append(sentiment[j](translated[-1]))
      out["translated"], out["requantified"] = jnp.stack(translated, 2), jnp.stack(found, 2)
    return out

  def _vector(self, name: str, batch: types.Batch) -> Array:
    """[B, d] of a modality."""
    m: types.Modality = getattr(batch, name)
    x = bert_lib.text_states(self.bert.config, batch) if name == "text" else masking.observed(m)
    feedforward = self.feedforward or 4 * self.size
    states = distill.SequenceEncoder(
      self.size, self.heads, self.depth, feedforward, self.dropout, self.norm, name=name
    )(x, m.valid)
    if self.last == "padded":
      return states[:, -1]
    last = jnp.maximum(m.valid.sum(1) - 1, 0)
    return jnp.take_along_axis(states, last[:, None, None], 1)[:, 0]


class Discriminator(nn.Module):
  """[..., D] -> [...] logits of "teacher" (ours: two layers, LeakyReLU)."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    hidden = jax.nn.leaky_relu(layers.Dense(x.shape[-1], name="in")(x), 0.2)
    return layers.Dense(1, name="out")(hidden)[..., 0]


def distance(x: Array, y: Array) -> Array:
  """‖x - y‖ over the last axis, with a gradient (of zeros) at 0."""
  return jnp.sqrt(((x - y) ** 2).sum(-1) + 1e-8)


def factorization(out: Mapping[str, Array], detach_targets: bool = True) -> dict[str, Array]:
  """The losses of FRF: "self", "cross" and "recon" (Eq. 1-3), means of plain L2 norms.

  Args:
    out: of `Hrlf` in training.
    detach_targets: whether the gradient stops at the targets Z and Q (ours: the paper does not say
      so, but without it the vectors are easiest to restore where all samples have the same one,
      and there the plain norms, which pull as hard at any distance, hold them).

  Returns:
    [] each.
  """
  z, q = out["z"], out["q"]
  if detach_targets:
    z, q = jax.lax.stop_gradient((z, q))
  n = z.shape[1]
  errors = distance(out["translated"], z[:, None]).mean(0)  # [n, n]
  own = jnp.trace(errors)
  return {
    "self": own / n,
    "cross": (errors.sum() - own) / (n * n - n),
    # what modality j's encoder finds in any translation into j is j's own sentiment
    "recon": distance(out["requantified"], q[:, None]).mean(),
  }


def scales(out: Mapping[str, Array], merge: str) -> list[Array]:
  """The representations of the three scales, [K, B, D] each, from the widest on (§3.4).

  Args:
    out: of `Hrlf`.
    merge: what becomes of the two equally wide ones: "stack" keeps them as K = 2 samples of one
      distribution, as wide as the paper states; "concat" joins their channels, as the paper's
      words have it; "mean" averages them.

  Returns:
    [K, B, 3d], [K, B, 2d] and [1, B, d].
  """
  found = []
  for one, other in ((1, 5), (2, 4), (3, 3)):
    group = [out[f"scale_{n}"] for n in sorted({one, other})]
    if merge == "concat":
      group = [jnp.concatenate(group, -1)]
    elif merge == "mean":
      group = [sum(group) / len(group)]
    found.append(jnp.stack(group))
  return found


def judgement(teacher: Array, student: Array) -> Array:
  """E[log(1 - D(student))] + E[log D(teacher)] of one scale (Eq. 9), which D maximizes.

  Args:
    teacher, student: [...] logits of D.

  Returns:
    [] the value.
  """
  return jax.nn.log_sigmoid(teacher).mean() + jax.nn.log_sigmoid(-student).mean()


def disguise(student: Array, kind: str) -> Array:
  """What the student minimizes of `judgement`.

  Args:
    student: [...] logits of D.
    kind: "saturating", E[log(1 - D)] as in Eq. 9, whose slope is the steepest where D is fooled
      already, so that it has no end; or "nonsaturating", E[-log D], which ends there.

  Returns:
    [] the value.
  """
  value = jax.nn.log_sigmoid(-student if kind == "saturating" else student).mean()
  return value if kind == "saturating" else -value


@systems.configurable(Hrlf)
def make(
  network: Hrlf,
  *,
  task_weight: float = 1.0,
  frf_weight: float = 1.0,
  hmi_weight: float = 1.0,
  hal_weight: float = 1.0,
  kl_weight: float = 1.0,
  detach_targets: bool = True,
  scale_merge: str = "stack",
  negatives: str = "all",
  adversary_kind: str = "saturating",
  discriminator_rate: float = 1e-3,
  teacher_frf: bool = True,
  teacher_epochs: int = 50,
  student_start: str = "teacher",
) -> types.System:
  """HRLF as a system; the defaults are the paper's for MOSI.

  The teacher of the second phase is that of the first one's last epoch: what is validated is the
  student. It is frozen, without dropout, and reads complete data whatever the method. The
  statistics networks, one a scale, are trained with the student ("^statistics/" for optimizer
  groups). A student's step begins with one of the discriminators, one a scale too: they and their
  Adam are in `extra`, so that neither a method's inner loop nor a clipped norm reaches them.
  Parts of weight 0 are not computed.

  Args:
    network: settings of `Hrlf`, for teacher and student.
    task_weight, frf_weight, hmi_weight, hal_weight, kl_weight: of the loss parts; the paper has
      no weights.
    detach_targets: of `factorization`.
    scale_merge: see `scales`.
    negatives: see `distill.information`.
    adversary_kind: see `disguise`. As Eq. 9 has it, representations and gradients grow at times,
      until the discriminators win for good; in training on MOSI both kinds validated alike.
    discriminator_rate: of the discriminators' Adam (ours: the configs' is the student's).
    teacher_frf: whether the teacher is trained by FRF too, or by the task alone (ours).
    teacher_epochs: epochs of phase "teacher", before the student's begin.
    student_start: as the "teacher", or with "fresh" parameters (the paper: "initialized"). What
      the stack of layers passes on of the task's gradient is little at first, and FRF, which has
      all weight meanwhile, makes a fresh student's vectors alike. On the built-in data it got out
      of there after some epochs without HAL, but never with HAL at the paper's weight of 1, where
      all it learns is ever larger representations. A student that starts as the teacher learns.

  Returns:
    The system. Both phases log the parts task, self, cross and recon, "student" also the
    information (hmi), hal, kl and "told_apart", the share of representations that the
    discriminators assign to the right network.
  """
  chosen = dict(
    norm=network.norm,
    last=network.last,
    decoder=network.decoder,
    scale_merge=scale_merge,
    negatives=negatives,
    adversary_kind=adversary_kind,
    student_start=student_start,
  )
  for name, value in chosen.items():
    if value not in CHOICES[name]:
      raise ValueError(f"{name} is {value!r}, expected one of {CHOICES[name]}.")
  if network.size % 2 or network.size % network.heads:
    raise ValueError(
      f"size is {network.size}, but must be even and divisible by heads={network.heads}."
    )
  model = systems.functional(network, head="head")
  if not isinstance(discriminator_rate, (int, float)):
    raise types.UsageError(
      f"discriminator_rate is {discriminator_rate!r}, expected a number: where the configs'"
      " learning rate is a schedule, set model.discriminator_rate too."
    )
  adam = optim.make(learning_rate=discriminator_rate)
  widths = [network.size * n * (2 if scale_merge == "concat" and n > 1 else 1) for n in (3, 2, 1)]

  def init(key, spec):
    keys = jax.random.split(key, 4)
    params = {
      "teacher": model.init(keys[0], spec)[0],
      "student": model.init(keys[1], spec)[0],
      "statistics": distill.init_critics(keys[2], distill.Statistics, widths, 2),
    }
    if not hal_weight:
      return params, {}
    discriminator = distill.init_critics(keys[3], lambda width: Discriminator(), widths, 1)
    return params, {"discriminator": discriminator, "adam": adam.init(discriminator)}

  def predict(params, batch, extra):
    return model.predict(params["student"], batch, extra)

  def own_parts(out, batch, frf):
    """What a network is trained by without its teacher."""
    parts = {"task": losses.task(out["prediction"], batch.label).mean()}
    total = task_weight * parts["task"]
    if frf:
      parts |= factorization(out, detach_targets)
      total += frf_weight * sum(parts[name] for name in ("self", "cross", "recon"))
    return total, parts

  def teacher_loss(params, batch, key, extra):
    frf = teacher_frf and frf_weight != 0
    out, _ = model.apply(params["teacher"], masking.complete(batch), {}, key, train=frf)
    total, parts = own_parts(out, batch, frf)
    return total, types.Aux(parts, extra)

  def judge(discriminator, pairs):
    """The logits of each scale's pair."""
    own = [distill.bind(Discriminator(), discriminator[f"scale_{n}"]) for n in range(3)]
    return [(one(t), one(s)) for one, (t, s) in zip(own, pairs, strict=True)]

  def discriminate(extra, pairs):
    """A step of the discriminators; the student's gradient takes what they become as given."""
    pairs, old = jax.lax.stop_gradient((pairs, extra["discriminator"]))

    def fooled(discriminator):
      return -jnp.stack([judgement(*pair) for pair in judge(discriminator, pairs)]).sum()

    updates, state = adam.update(jax.grad(fooled)(old), extra["adam"], old)
    return {"discriminator": optax.apply_updates(old, updates), "adam": state}

  def student_loss(params, batch, key, extra):
    frf = frf_weight != 0
    out, _ = model.apply(params["student"], batch, {}, key, train=frf)
    target = model.predict(params["teacher"], masking.complete(batch), {})
    target = jax.lax.stop_gradient(target)
    total, parts = own_parts(out, batch, frf)
    pairs = list(zip(scales(target, scale_merge), scales(out, scale_merge), strict=True))
    if hmi_weight:
      own = params["statistics"]
      ts = [distill.bind(distill.Statistics(d), own[f"scale_{n}"]) for n, d in enumerate(widths)]
      bounds = [distill.information(t, *pair, negatives) for t, pair in zip(ts, pairs, strict=True)]
      parts["hmi"] = jnp.stack(bounds).sum()
      total -= hmi_weight * parts["hmi"]
    if hal_weight:
      extra = discriminate(extra, pairs)
      logits = judge(extra["discriminator"], pairs)
      parts["told_apart"] = (
        jnp.stack([(t > 0).mean() + (s < 0).mean() for t, s in logits]).mean() / 2
      )
      parts["hal"] = jnp.stack([disguise(s, adversary_kind) for _, s in logits]).sum()
      total += hal_weight * parts["hal"]
    if kl_weight:
      parts["kl"] = distill.divergence(target["prediction"], out["prediction"])
      total += kl_weight * parts["kl"]
    return total, types.Aux(parts, extra)

  def on_epoch(params, extra, epoch, train):
    del train
    if student_start == "teacher" and epoch == teacher_epochs:
      params = {**params, "student": jax.tree.map(jnp.copy, params["teacher"])}
    return params, extra

  phases = (
    types.Phase(
      "teacher", teacher_loss, "^teacher/", epochs=(0, teacher_epochs), hessian="symmetric"
    ),
    types.Phase(
      "student",
      student_loss,
      "^(student|statistics)/",
      epochs=(teacher_epochs, None),
      on_epoch=on_epoch,
      hessian="symmetric",
    ),
  )
  return types.System(init, predict, phases)
