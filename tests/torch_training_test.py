"""Against PyTorch (extra "parity"): optimizer steps, and importing what was trained there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from command import call
from experiments import build, import_torch
from experiments.configs import misa, mmim, mmin, self_mm
from mmjax import optim, torch_import

torch = pytest.importorskip("torch")
nn = torch.nn


class AudioOrVision(nn.Module):
  def __init__(self, width, hidden, out):
    super().__init__()
    self.rnn = nn.LSTM(width, hidden, batch_first=True)
    self.linear_1 = nn.Linear(hidden, out)

  def forward(self, x, lengths):
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return self.linear_1(self.rnn(packed)[1][0].squeeze(0))


class SelfMM(nn.Module):
  """The published network behind its text encoder, by its names; text states are given."""

  def __init__(self, text, audio, vision):
    super().__init__()
    self.audio_model = AudioOrVision(audio, 5, 4)
    self.video_model = AudioOrVision(vision, 6, 3)
    widths = {"fusion": text + 7, "text": text, "audio": 4, "video": 3}
    for name, hidden in (("fusion", 8), ("text", 6), ("audio", 4), ("video", 5)):
      for n, shape in enumerate(((widths[name], hidden), (hidden, hidden), (hidden, 1)), 1):
        setattr(self, f"post_{name}_layer_{n}", nn.Linear(*shape))

  def forward(self, text, audio, audio_lengths, vision, vision_lengths):
    vectors = {
      "text": text,
      "audio": self.audio_model(audio, audio_lengths),
      "video": self.video_model(vision, vision_lengths),
    }
    vectors["fusion"] = torch.cat(list(vectors.values()), -1)
    out = {}
    for name, x in vectors.items():
      for n in (1, 2):
        x = torch.relu(getattr(self, f"post_{name}_layer_{n}")(x))
      out[name] = getattr(self, f"post_{name}_layer_3")(x).squeeze(-1)
    return out


SETTINGS = dict(
  lstm_sizes=(5, 6),
  out_sizes=(4, 3),
  head_sizes=(8, 6, 4, 5),
  pooling="first",
  head_dropout=(0.0, 0.0, 0.0, 0.0),
)


def tensors(batch):
  """What the PyTorch model reads of a batch."""
  out = [torch.tensor(np.asarray(batch.text.x[:, 0]))]
  for m in (batch.audio, batch.vision):
    out += [torch.tensor(np.asarray(m.x)), torch.tensor(np.asarray(m.valid.sum(1)))]
  return out


def make_config():
  config = self_mm.get_config("tiny")
  config.model.update(SETTINGS)
  return config


def test_training_there_and_here(tiny, tmp_path):
  """Adam, a rate and weight decay per module, four batches an update; then the import."""
  torch.manual_seed(0)
  config = make_config()
  dataset = build.load_data(config, str(tiny))
  train = jax.tree.map(jnp.asarray, dataset.train)
  theirs = SelfMM(*(modality.dim for modality in dataset.spec[:3]))
  other = [p for n, p in theirs.named_parameters() if not n.startswith(("audio_m", "video_m"))]
  adam = torch.optim.Adam(
    [
      {"params": theirs.audio_model.parameters(), "lr": 5e-3, "weight_decay": 1e-3},
      {"params": theirs.video_model.parameters(), "lr": 5e-3, "weight_decay": 1e-3},
      {"params": other, "lr": 1e-3, "weight_decay": 1e-3},
    ]
  )

  def save(path):
    torch.save({f"Model.{name}": p for name, p in theirs.state_dict().items()}, path)

  save(tmp_path / "first.pth")
  state = torch_import.read_state(tmp_path / "first.pth")
  found = import_torch.import_state(config, state, str(tiny))[1]
  system = build.make_system(config)
  optimizer = optim.make(total_steps=8, **config.optimizer.to_dict())

  @jax.jit
  def step(params, opt, extra, batch):
    grads, aux = jax.grad(system.loss, has_aux=True)(params, batch, None, extra)
    updates, opt = optimizer.update(grads, opt, params)
    return optax.apply_updates(params, updates), opt, aux.extra

  params, extra = found["params"], found["extra"]
  opt = optimizer.init(params)
  for n in range(8):
    batch = jax.tree.map(lambda a, n=n: a[n % 4 * 8 : n % 4 * 8 + 8], train)
    params, opt, extra = step(params, opt, extra, batch)
    if n % 4 == 0:
      adam.zero_grad()
    out = theirs(*tensors(batch))
    # in the first epoch every label is the multimodal one: the unimodal weights are 0
    parts = [(out[name] - torch.tensor(np.asarray(batch.label))).abs().mean() for name in out]
    (parts[-1] + 0 * sum(parts[:-1])).backward()
    if n % 4 == 3:
      adam.step()
  save(tmp_path / "trained.pth")

  code, output = call(
    "import_torch",
    f"--checkpoint={tmp_path / 'trained.pth'}",
    "--config=self_mm:tiny",
    f"--data_dir={tiny}",
    f"--out={tmp_path / 'run'}",
    *(f"--config.model.{name}={value}" for name, value in SETTINGS.items()),
  )
  assert code == 0 and "experiments.evaluate" in output, output
  run, selected = build.load_run(tmp_path / "run")
  imported = {"params": selected["valid/mae"].params, "extra": selected["valid/mae"].extra}
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), params, imported["params"]
  )
  test = jax.tree.map(jnp.asarray, run.dataset.test)
  ours = run.recipe.system.predict(**imported, batch=test)["prediction"]
  with torch.no_grad():
    np.testing.assert_allclose(ours, theirs(*tensors(test))["fusion"].numpy(), atol=1e-5)


def test_what_cannot_be_imported(tiny, tmp_path):
  with pytest.raises(ValueError, match="nowhere.pth: cannot be read"):
    torch_import.read_state(tmp_path / "nowhere.pth")
  torch.save(SelfMM(3, 3, 3), tmp_path / "module.pth")  # a whole module: code would have to run
  with pytest.raises(ValueError, match="state_dict"):
    torch_import.read_state(tmp_path / "module.pth")
  torch.save({"epoch": 3}, tmp_path / "other.pth")
  with pytest.raises(ValueError, match="no state_dict"):
    torch_import.read_state(tmp_path / "other.pth")
  with pytest.raises(ValueError, match="net_A"):
    torch_import.read_state(tmp_path)
  state = {name: p.numpy() for name, p in SelfMM(3, 3, 3).state_dict().items()}
  state["stranger"] = state.pop("post_text_layer_1.bias")
  with pytest.raises(ValueError, match="stranger") as error:
    import_torch.import_state(make_config(), state, str(tiny))
  assert "post_text/layer_1/bias" in str(error.value)  # lacks
  assert "audio_rnn/w_ih" in str(error.value)  # misshapen


def test_mmims_rate_falls_as_there():
  """ReduceLROnPlateau on the validation loss, as the published trainer steps it."""
  settings = mmim.get_config("mosi").phase_optimizer.main.plateau.to_dict()
  optimizer = optim.make(name="sgd", learning_rate=1.0, plateau=settings)
  weight = torch.nn.Parameter(torch.zeros(1))
  sgd = torch.optim.SGD([weight], lr=1.0)
  scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(sgd, mode="min", **settings)
  state, params = optimizer.init({"w": jnp.zeros(1)}), {"w": jnp.zeros(1)}
  losses = np.concatenate([np.linspace(2, 1, 5), np.full(50, 1.00005), [0.5], np.full(45, 0.6)])
  for loss in losses:
    scheduler.step(loss)
    state = optim.observe(state, -loss)
    update, state = optimizer.update({"w": jnp.ones(1)}, state, params)
    np.testing.assert_allclose(-update["w"], sgd.param_groups[0]["lr"])
  assert sgd.param_groups[0]["lr"] < 0.3


@pytest.mark.parametrize("name", ["misa", "mmim", "mmin"])
def test_peculiar_optimizers_step_as_there(name):
  """MISA clips values; MMIM and MMIN norms, MMIN's of each network, with β₁ = 0.5."""
  random = np.random.default_rng(0)
  shapes = {"audio": (3, 2), "text": (4,)}
  start = {part: random.normal(size=shape).astype(np.float32) for part, shape in shapes.items()}
  theirs = {part: nn.Parameter(torch.tensor(value)) for part, value in start.items()}
  if name == "misa":
    settings = misa.get_config("mosi").optimizer.to_dict()
    adam = torch.optim.Adam(theirs.values(), lr=1e-4)
    clip = lambda: nn.utils.clip_grad_value_(theirs.values(), 0.8)  # noqa: E731
  elif name == "mmim":
    settings = mmim.get_config("mosi").optimizer.to_dict()
    adam = torch.optim.Adam(theirs.values(), lr=1e-3, weight_decay=1e-4)
    clip = lambda: nn.utils.clip_grad_norm_(theirs.values(), 1.0)  # noqa: E731
  else:
    config = mmin.get_config("iemocap")
    settings = {**config.optimizer, **config.phase_optimizer.student, "learning_rate": 2e-4}
    adam = torch.optim.Adam(theirs.values(), lr=2e-4, betas=(0.5, 0.999))

    def clip():
      for parameter in theirs.values():
        nn.utils.clip_grad_norm_([parameter], 1.0)

  optimizer = optim.make(**settings)
  params = {"student": {"encoders": {p: {"w": jnp.asarray(v)} for p, v in start.items()}}}
  state = optimizer.init(params)
  for _ in range(5):
    grads = {p: 2 * random.normal(size=shape).astype(np.float32) for p, shape in shapes.items()}
    for part, gradient in grads.items():
      theirs[part].grad = torch.tensor(gradient)
    clip()
    adam.step()
    ours = {"student": {"encoders": {p: {"w": jnp.asarray(g)} for p, g in grads.items()}}}
    updates, state = optimizer.update(ours, state, params)
    params = optax.apply_updates(params, updates)
  for part, parameter in theirs.items():
    found = params["student"]["encoders"][part]["w"]
    np.testing.assert_allclose(found, parameter.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert np.abs(found - start[part]).max() > 1e-4
