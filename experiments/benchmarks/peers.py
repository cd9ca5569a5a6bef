"""The systems in PyTorch, by their published names, and M³S as people write it there.

Only the benchmarks use this module; it needs torch (extra "parity").
"""

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmjax import types

Inputs = Mapping[str, torch.Tensor]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tensors(batch: types.Batch) -> dict[str, torch.Tensor]:
  """What the modules below read of a batch, on the device."""
  import numpy as np

  out = {"label": torch.tensor(np.asarray(batch.label))}
  for name in types.MODALITIES:
    m = getattr(batch, name)
    out[name] = torch.tensor(np.asarray(m.x))
    out[f"{name}_seen"] = torch.tensor(np.asarray(m.seen)).float()
    out[f"{name}_valid"] = torch.tensor(np.asarray(m.valid))
    out[f"{name}_length"] = torch.tensor(np.asarray(m.valid.sum(1)))
  return {name: value.to(DEVICE) for name, value in out.items()}


def wait() -> None:
  """Until the device has done what it was asked for."""
  if DEVICE.type == "cuda":
    torch.cuda.synchronize()


def observed(inputs: Inputs, name: str) -> torch.Tensor:
  return inputs[name] * inputs[f"{name}_seen"]


class Recurrence(nn.LSTM):
  """One layer of nn.LSTM over padded sequences: outputs, zero on padding, and the final states.

  The padding is computed too, each direction by itself: packed sequences, which the published code
  uses, cannot run on the LSTM of oneDNN and took three to four times as long in first order.
  `by_hand`, in the operations that `torch.func` can transform.
  """

  by_hand = False

  def __init__(self, width, hidden, bidirectional=False):
    super().__init__(width, hidden, batch_first=True, bidirectional=bidirectional)

  def forward(self, x, length):
    """x [B, L, D], length [B] -> [B, max(length), H per direction], [directions, B, H]."""
    run = self._run_by_hand if self.by_hand else self._run
    found = [run(x, length, suffix) for suffix in ("", "_reverse")[: 1 + self.bidirectional]]
    outputs, final = zip(*found, strict=True)
    return torch.cat(outputs, -1), torch.stack(final)

  def _weights(self, suffix):
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [getattr(self, f"{name}_l0{suffix}") for name in names]

  def _run(self, x, length, suffix):
    step = torch.arange(int(length.max()), device=x.device)
    valid = step < length[:, None]
    backwards = torch.where(valid, length[:, None] - 1 - step, step)  # of each row's own steps

    def turn(y):
      return y.gather(1, backwards[:, :, None].expand(-1, -1, y.shape[-1])) if suffix else y

    zero = x.new_zeros(1, len(x), self.hidden_size)
    x = turn(x[:, : len(step)])
    # biases, layers, dropout, training, bidirectional, batch first
    settings = True, 1, 0.0, self.training, False, True
    outputs = torch.lstm(x, (zero, zero), self._weights(suffix), *settings)[0]
    final = outputs[torch.arange(len(x), device=x.device), length - 1]
    return turn(outputs) * valid[:, :, None], final

  def _run_by_hand(self, x, length, suffix):
    w_ih, w_hh, b_ih, b_hh = self._weights(suffix)
    steps = int(length.max())
    projected = x[:, :steps] @ w_ih.T + b_ih + b_hh
    h = c = x.new_zeros(len(x), self.hidden_size)
    outputs: list[Any] = [None] * steps
    for t in reversed(range(steps)) if suffix else range(steps):
      i, f, g, o = (projected[:, t] + h @ w_hh.T).chunk(4, -1)
      c_next = f.sigmoid() * c + i.sigmoid() * g.tanh()
      h_next = o.sigmoid() * c_next.tanh()
      valid = (t < length)[:, None]
      h, c = torch.where(valid, h_next, h), torch.where(valid, c_next, c)
      outputs[t] = torch.where(valid, h_next, 0.0)
    return torch.stack(outputs, 1), h


class TokenStates(nn.Module):
  """States of a BERT of base size, from token ids; a missing one is [UNK]."""

  def __init__(self):
    super().__init__()
    import transformers

    self.model = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False)

  def forward(self, inputs):
    ids = torch.where(inputs["text_seen"] > 0, inputs["text"].long(), 100)
    return self.model(ids, attention_mask=inputs["text_valid"].long()).last_hidden_state


class Branch(nn.Module):
  """Self-MM's encoder of audio or vision."""

  def __init__(self, width, hidden, out):
    super().__init__()
    self.rnn = Recurrence(width, hidden)
    self.linear_1 = nn.Linear(hidden, out)

  def forward(self, x, length):
    return self.linear_1(self.rnn(x, length)[1][0])


class SelfMM(nn.Module):
  """Self-MM; the defaults are MMSA's for MOSI. Text is states, or tokens for a BERT."""

  def __init__(self, text, audio, vision, tokens=False):
    super().__init__()
    self.text_model = TokenStates() if tokens else None
    self.audio_model, self.video_model = Branch(audio, 16, 16), Branch(vision, 32, 32)
    widths = {"fusion": text + 48, "text": text, "audio": 16, "video": 32}
    for name, hidden in (("fusion", 128), ("text", 32), ("audio", 16), ("video", 32)):
      for n, shape in enumerate(((widths[name], hidden), (hidden, hidden), (hidden, 1)), 1):
        setattr(self, f"post_{name}_layer_{n}", nn.Linear(*shape))

  def forward(self, inputs):
    states = self.text_model(inputs) if self.text_model else observed(inputs, "text")
    vectors = {
      "text": states[:, 0],
      "audio": self.audio_model(observed(inputs, "audio"), inputs["audio_length"]),
      "video": self.video_model(observed(inputs, "vision"), inputs["vision_length"]),
    }
    vectors["fusion"] = torch.cat(list(vectors.values()), -1)
    out = {}
    for name, x in vectors.items():
      for n in (1, 2):
        x = torch.relu(getattr(self, f"post_{name}_layer_{n}")(x))
      out[name] = getattr(self, f"post_{name}_layer_3")(x).squeeze(-1)
    # in the first epoch all labels are the multimodal one, and unimodal losses have weight 0
    errors = {name: (value - inputs["label"]).abs().mean() for name, value in out.items()}
    return errors["fusion"] + 0 * (errors["text"] + errors["audio"] + errors["video"])


class Misa(nn.Module):
  """MISA without dropout; lengths of the text pack all modalities."""

  def __init__(self, text, audio, vision, tokens=False, hidden=128):
    super().__init__()
    self.bertmodel = TokenStates() if tokens else None
    for m, d in (("v", vision), ("a", audio)):
      setattr(self, f"{m}rnn1", Recurrence(d, d, bidirectional=True))
      setattr(self, f"{m}rnn2", Recurrence(2 * d, d, bidirectional=True))
      setattr(self, f"{m}layer_norm", nn.LayerNorm(2 * d))
    for m, width in (("t", text), ("v", 4 * vision), ("a", 4 * audio)):
      layer = nn.Sequential()
      layer.add_module(f"project_{m}", nn.Linear(width, hidden))
      layer.add_module(f"project_{m}_activation", nn.ReLU())
      layer.add_module(f"project_{m}_layer_norm", nn.LayerNorm(hidden))
      setattr(self, f"project_{m}", layer)
      for name, n in ((f"private_{m}", 3 if m == "a" else 1), (f"recon_{m}", 1)):
        part = nn.Sequential()
        part.add_module(f"{name}_{n}", nn.Linear(hidden, hidden))
        setattr(self, name, part)
    self.shared = nn.Sequential()
    self.shared.add_module("shared_1", nn.Linear(hidden, hidden))
    self.sp_discriminator = nn.Sequential()
    self.sp_discriminator.add_module("sp_discriminator_layer_1", nn.Linear(hidden, 4))
    self.fusion = nn.Sequential()
    self.fusion.add_module("fusion_layer_1", nn.Linear(6 * hidden, 3 * hidden))
    self.fusion.add_module("fusion_layer_1_activation", nn.ReLU())
    self.fusion.add_module("fusion_layer_3", nn.Linear(3 * hidden, 1))
    layer = nn.TransformerEncoderLayer(hidden, 2, dropout=0.0)
    self.transformer_encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

  def forward(self, inputs):
    length = inputs["text_length"]
    states = self.bertmodel(inputs) if self.bertmodel else observed(inputs, "text")
    text = (states * inputs["text_valid"][:, :, None]).sum(1) / length[:, None]
    vectors = {"t": text}
    for m, name in (("v", "vision"), ("a", "audio")):
      h, first = getattr(self, f"{m}rnn1")(observed(inputs, name), length)
      h = getattr(self, f"{m}layer_norm")(h)
      _, second = getattr(self, f"{m}rnn2")(h, length)
      vectors[m] = torch.cat([first, second], 2).permute(1, 0, 2).reshape(len(text), -1)
    original = {m: getattr(self, f"project_{m}")(vectors[m]) for m in "tva"}
    private = {m: torch.sigmoid(getattr(self, f"private_{m}")(original[m])) for m in "tva"}
    shared = {m: torch.sigmoid(self.shared(original[m])) for m in "tva"}
    restored = {m: getattr(self, f"recon_{m}")(private[m] + shared[m]) for m in "tva"}
    tokens = torch.stack([kind[m] for kind in (private, shared) for m in "tva"])
    fused = self.transformer_encoder(tokens)
    score = self.fusion(torch.cat(list(fused), 1)).squeeze(-1)

    pairs = [(private[m], shared[m]) for m in "tva"]
    pairs += [(private[m], private[n]) for m, n in ("at", "av", "tv")]
    alike = [(shared[m], shared[n]) for m, n in ("tv", "ta", "av")]
    return (
      (score - inputs["label"]).pow(2).mean()
      + 0.1 * sum(difference(x, y) for x, y in pairs)
      + 0.3 / 3 * sum(discrepancy(x, y) for x, y in alike)
      + sum((restored[m] - original[m]).pow(2).mean() for m in "tva") / 3
    )


def difference(x, y):
  x, y = (z - z.mean(0) for z in (x, y))
  x, y = (z / (z.norm(dim=1, keepdim=True).detach() + 1e-6) for z in (x, y))
  return (x.T @ y).pow(2).mean()


def discrepancy(x, y):
  total = (x.mean(0) - y.mean(0)).norm()
  for k in range(2, 6):
    total = total + ((x - x.mean(0)) ** k).mean(0).sub(((y - y.mean(0)) ** k).mean(0)).norm()
  return total


MODELS = {"misa": Misa, "self_mm": SelfMM}


def plain(
  module: nn.Module, order: int, k: int, rate: float, transform: Callable = lambda loss: loss
) -> Callable:
  """M³S by `torch.autograd.grad` over a functional call: the gradient at θ*, or through it."""
  params = dict(module.named_parameters())

  @transform
  def loss(values, inputs):
    return torch.func.functional_call(module, values, (inputs,))

  def step(support, query):
    values = params
    for _ in range(k):
      grads = torch.autograd.grad(
        loss(values, support), list(values.values()), create_graph=order == 2, allow_unused=True
      )
      moved = {
        name: value if g is None else value - rate * g
        for (name, value), g in zip(values.items(), grads, strict=True)
      }
      if order == 1:  # a copy, as `deepcopy(model)` and SGD steps on it
        moved = {name: value.detach().requires_grad_() for name, value in moved.items()}
      values = moved
    wanted = params if order == 2 else values
    value = loss(values, query)
    grads = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
    return value, dict(zip(params, grads, strict=True))

  return step


def compiled(module: nn.Module, order: int, k: int, rate: float) -> Callable:
  """`plain` of a loss that `torch.compile` has compiled, which has no second derivative.

  LSTMs stay as they are: it would unroll their loops, for minutes.
  """
  torch._dynamo.reset()
  for part in module.modules():
    if isinstance(part, Recurrence):
      setattr(part, "forward", torch.compiler.disable(part.forward))  # noqa: B010
  return plain(module, order, k, rate, functools.partial(torch.compile, dynamic=False))


def functional(module: nn.Module, order: int, k: int, rate: float) -> Callable:
  """M³S with `torch.func.grad`."""
  params = {name: p.detach() for name, p in module.named_parameters()}

  def loss(values, inputs):
    return torch.func.functional_call(module, values, (inputs,))

  def adapt(values, support):
    for _ in range(k):
      grads = torch.func.grad(loss)(values, support)
      values = {name: value - rate * grads[name] for name, value in values.items()}
    return values

  def step(support, query):
    if order == 1:
      grads, value = torch.func.grad_and_value(loss)(adapt(params, support), query)
    else:
      meta = lambda values: loss(adapt(values, support), query)  # noqa: E731
      grads, value = torch.func.grad_and_value(meta)(params)
    return value, grads

  return step


def torchopt_steps(module: nn.Module, order: int, k: int, rate: float) -> Callable:
  """Second-order M³S with `torchopt`: a differentiable MetaSGD and its state dicts."""
  import torchopt

  inner = torchopt.MetaSGD(module, lr=rate)

  def step(support, query):
    start = torchopt.extract_state_dict(module, by="reference")
    params = dict(module.named_parameters())
    for _ in range(k):
      inner.step(module(support))
    value = module(query)
    grads = torch.autograd.grad(value, list(params.values()), allow_unused=True)
    torchopt.recover_state_dict(module, start)
    return value, dict(zip(params, grads, strict=True))

  return step


def higher_steps(module: nn.Module, order: int, k: int, rate: float) -> Callable:
  """M³S with `higher`."""
  import higher

  def step(support, query):
    optimizer = torch.optim.SGD(module.parameters(), lr=rate)
    with higher.innerloop_ctx(
      module, optimizer, copy_initial_weights=False, track_higher_grads=order == 2
    ) as (copy, inner):
      for _ in range(k):
        inner.step(copy(support))
      value = copy(query)
      wanted = module.parameters() if order == 2 else copy.parameters()
      grads = torch.autograd.grad(value, list(wanted), allow_unused=True)
    return value, dict(zip((n for n, _ in module.named_parameters()), grads, strict=True))

  return step


def make_grid(
  module: nn.Module, inputs: Inputs, rates: Iterable[float], seeds: int, batch_size: int = 128
) -> Callable[[], None]:
  """The robustness evaluation as it is written there: loops over rates, seeds and batches.

  As in the published code a pass computes the losses too.
  """
  _set_by_hand(module, False)
  batches = [
    {name: x[start : start + batch_size] for name, x in inputs.items()}
    for start in range(0, len(inputs["label"]), batch_size)
  ]

  @torch.no_grad()
  def run():
    for rate in rates:
      for seed in range(seeds):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        for batch in batches:
          draws = {
            f"{m}_seen": torch.rand(batch[f"{m}_seen"].shape, generator=generator, device=DEVICE)
            for m in types.MODALITIES
          }
          module({**batch, **{name: (u >= rate).float() for name, u in draws.items()}})
    wait()

  return run


PEERS = {
  "torch": plain,
  "torch.compile": compiled,
  "torch.func": functional,
  "higher": higher_steps,
  "torchopt": torchopt_steps,
}
BY_HAND = ("torch.func", "torchopt")  # they cannot transform the native LSTM


def _set_by_hand(module: nn.Module, by_hand: bool) -> None:
  for part in module.modules():
    if isinstance(part, Recurrence):
      part.by_hand = by_hand


def make_step(peer: str, module: nn.Module, order: int, k: int, rate: float) -> Callable:
  """`(support, query) -> (loss, {parameter: meta-gradient})` of a peer."""
  _set_by_hand(module, peer in BY_HAND)
  step = PEERS[peer](module, order, k, rate)

  def run(support, query):
    # the LSTMs of oneDNN and cuDNN and fused attention are faster, but have no second derivative
    first = order == 1
    attention = contextlib.nullcontext() if first else sdpa_kernel(SDPBackend.MATH)
    backends = torch.backends
    with backends.mkldnn.flags(enabled=first), backends.cudnn.flags(enabled=first), attention:
      found = step(support, query)
    wait()
    return found

  return run


def available(order: int) -> Iterator[str]:
  """The peers that can run here, and make sense: of the libraries those that are installed."""
  yield "torch"
  if order == 1:
    yield "torch.compile"
  if order == 2:  # its first order cannot use the fast LSTM either
    yield "torch.func"
  for name in ("higher", "torchopt"):
    if importlib.util.find_spec(name) is not None and (order == 2 or name == "higher"):
      yield name
