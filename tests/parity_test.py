"""The parity binary: verdicts, dispatch, errors; and MISA against a second writing of it.

`record` writes a file of the recorded schema from PyTorch's own modules, so that other
dimensions, lengths, weights and tasks than those of the published recording are compared.
"""

import itertools
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from command import ROOT
from experiments import parity
from experiments.parity import __main__ as binary
from experiments.parity.goldens import misa

RECORDED = pathlib.Path(__file__).parent / "data" / "misa.npz"


@pytest.fixture(scope="module", autouse=True)
def precision():
  yield
  jax.config.update("jax_default_matmul_precision", None)  # the binary raises it


# Number of gradients, so that a comparison cannot lose some; mmin.npz is without its variants.
GRADIENTS = {"lmf": 27, "misa": 121, "mmim": 91, "mmin": 102, "self_mm": 75, "tfn": 30}
# Large files, which are not copied, and large programs: `pytest -m slow`.
LARGE = {
  "almt": 222,
  "cenet": 84,
  "cubemlp": 84,
  "dmd": 330,
  "gcnet": 88,
  "lnln": 306,
  "mctn": 50,
  "mult": 207,
  "smil": 22,
  "tetfn": 336,
  "tfr_net": 522,
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_published_models(name):
  compare_all(RECORDED.with_name(f"{name}.npz"), GRADIENTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_the_published_large_models(name, shared):
  compare_all(shared(f"parity/{name}.npz"), LARGE[name])


def compare_all(path, gradients):
  arrays = parity.read(path)
  rows = list(parity.find(path).compare(arrays))
  groups = parity.judge(rows, 1e-4, 1e-3)
  assert all(group.ok for group in groups), groups
  assert parity.uncovered(arrays, rows) == []
  counted = {group.name: group.tensors for group in groups}
  for group in ("output", "loss", "grad"):
    assert counted[group] >= sum(key.startswith(f"{group}/") for key in arrays)
  assert counted["grad"] == gradients


@pytest.mark.parametrize(
  ("ours", "theirs", "worst"),
  [
    ([1.0, 2.0], [1.0, 2.0], 0.0),
    ([1.0, 2.2], [1.0, 2.0], 0.1),
    ([0.2, 2.0], [0.0, 2.0], 0.1),  # relative to the tensor's largest magnitude
    ([1.0, np.nan], [1.0, 2.0], np.inf),
    ([[1.0, 2.0]], [1.0, 2.0], np.inf),
    ([0.0], [0.0], 0.0),
    ([1e-9], [0.0], np.inf),
  ],
)
def test_errors_are_relative_to_the_tensor(ours, theirs, worst):
  (group,) = parity.judge([("output", "M", np.array(ours), np.array(theirs))], 1e-4, 1e-3)
  np.testing.assert_allclose(group.worst, worst, rtol=1e-6)
  assert group.ok is (worst == 0)


def test_tensors_that_should_be_zero_are_measured_by_their_group():
  rows = [("grad", "kernel", np.array([3.0]), np.array([3.0]))]
  noise = ("grad", "key bias", np.array([2e-9]), np.array([-1e-9]))
  (group,) = parity.judge([*rows, noise], 1e-4, 1e-3)
  np.testing.assert_allclose(group.worst, 3e-9 / 3e-3)
  assert group.where == "key bias"
  assert group.ok


def test_gradients_have_a_tolerance_of_their_own():
  rows = [(name, "x", np.array([1.0005]), np.array([1.0])) for name in ("grad", "loss")]
  assert [group.ok for group in parity.judge(rows, 1e-4, 1e-3)] == [True, False]


def test_dispatch_on_the_files_name():
  for stem in ("misa", "MISA-big", "misa_2"):
    assert parity.find(pathlib.Path(f"{stem}.npz")).__name__ == "experiments.parity.goldens.misa"
  assert parity.find(pathlib.Path("m3s.npz")).__name__ == "experiments.parity.goldens.m3s"
  with pytest.raises(ValueError, match="starts with none of .*misa"):
    parity.find(pathlib.Path("other.npz"))


def test_the_binary_finds_a_wrong_gradient(tmp_path):
  arrays = parity.read(RECORDED)
  arrays["grad/shared.shared_1.weight"] = arrays["grad/shared.shared_1.weight"] * 1.01
  np.savez(tmp_path / "misa.npz", **arrays)
  command = [sys.executable, "-m", "experiments.parity", f"--golden={tmp_path / 'misa.npz'}"]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
  lines = done.stdout.splitlines()
  assert done.returncode == 1
  assert lines[-1] == "FAIL"
  assert [line.split()[0] for line in lines if line.endswith("ok")] == ["output", "mid", "loss"]
  assert any("shared/kernel" in line for line in lines)


def run(path, capsys):
  """Exit code and output of the binary's `main`."""
  with pytest.raises(SystemExit) as stop, flagsaver.flagsaver():
    flags.FLAGS(["parity", f"--golden={path}"])
    binary.main(["parity"])
  return stop.value.code, capsys.readouterr().out.splitlines()


def test_pass_is_the_last_line(tmp_path, capsys):
  np.savez(tmp_path / "metrics.npz", **{"x/pred": np.ones(3), "x/label": np.ones(3), "x/MAE": 0.0})
  code, lines = run(tmp_path / "metrics.npz", capsys)
  assert code == 0
  assert lines[-1] == "PASS"
  np.savez(tmp_path / "metrics.npz", something=1)
  code, lines = run(tmp_path / "metrics.npz", capsys)  # comparing nothing is no success
  assert code == 1
  assert lines[-1] == "FAIL"


def test_files_that_cannot_be_compared(tmp_path, capsys):
  """One line that names the file and the mend, then FAIL."""
  arrays = parity.read(RECORDED)

  def outcome(name, **changes):
    kept = {key: v for key, v in (arrays | changes).items() if v is not None}
    np.savez(tmp_path / name, **kept)
    return error_of(tmp_path / name)

  def error_of(path):
    code, lines = run(path, capsys)
    assert code == 1
    assert lines[-1] == "FAIL"
    assert str(path) in lines[0]
    return "\n".join(lines)

  assert "lacks 'input/audio'" in outcome("misa_a.npz", **{"input/audio": None})
  assert "stranger" in outcome("misa_b.npz", **{"param/stranger": np.zeros(2)})
  assert "shared/kernel" in outcome("misa_c.npz", **{"param/shared.shared_1.weight": None})
  assert "starts with none of" in outcome("unknown.npz")
  (tmp_path / "misa_d.npz").write_bytes(b"PK cut off")
  assert "cannot be read" in error_of(tmp_path / "misa_d.npz")
  assert "cannot be read" in error_of(tmp_path / "misa_nowhere.npz")


def test_what_is_recorded_must_be_compared():
  rows = [("output", "M", 0, 0), ("loss", "total", 0, 0)]
  keys = ["output/M", "output/w", "loss/total", "loss/extra", "mid/x", "param/x"]
  assert parity.uncovered(keys, rows) == ["output/w", "loss/extra"]


# (dims text, audio, vision), (lengths text, audio, vision), valid text lengths, hidden_size,
# (BERT layers, heads), weights (diff, sim, recon), classes
OTHERS = {
  "full text": ((8, 3, 4), (6, 6, 9), (6, 4, 6), 6, (1, 2), (0.3, 0, 0.7), 0),
  "classes": ((4, 2, 3), (5, 8, 6), (2, 5, 3, 3, 2, 4, 5), 8, (3, 1), (0.1, 2, 1.5), 4),
}


@pytest.mark.parametrize("name", OTHERS)
def test_misa_of_other_shapes(name):
  torch = pytest.importorskip("torch")
  torch.manual_seed(0)
  arrays = record(torch, *OTHERS[name])
  groups = parity.judge(misa.compare(arrays), 1e-4, 1e-3)
  assert [group.name for group in groups] == ["output", "mid", "loss", "grad"]
  assert all(group.ok for group in groups), groups


def record(torch, dims, lengths, valid, hidden, bert_shape, weights, classes):
  """MISA out of PyTorch's modules, after the notes of the recorded file."""
  nn, rows, (layers, heads) = torch.nn, len(valid), bert_shape
  text, audio, vision = dims
  vocabulary, positions = 30, lengths[0] + 2
  names = nn.ModuleDict()

  def add(name, module):
    names[name.replace(".", "/")] = module
    for parameter in module.parameters():
      parameter.data += 0.1 * torch.randn_like(parameter)
    return module

  at = "bertmodel.model"
  words = add(f"{at}.embeddings.word_embeddings", nn.Embedding(vocabulary, text, padding_idx=0))
  places = add(f"{at}.embeddings.position_embeddings", nn.Embedding(positions, text))
  kinds = add(f"{at}.embeddings.token_type_embeddings", nn.Embedding(2, text))
  first_norm = add(f"{at}.embeddings.LayerNorm", nn.LayerNorm(text, eps=1e-12))
  add(f"{at}.pooler.dense", nn.Linear(text, text))
  blocks = [
    add(
      f"block.{n}",
      nn.TransformerEncoderLayer(
        text, heads, 2 * text, activation="gelu", layer_norm_eps=1e-12, batch_first=True
      ).eval(),
    )
    for n in range(layers)
  ]
  rnns = {
    f"{m}rnn{n}": add(f"{m}rnn{n}", nn.LSTM(n * d, d, bidirectional=True, batch_first=True))
    for m, d in (("v", vision), ("a", audio))
    for n in (1, 2)
  }
  norms, project, project_norm, private, recon = {}, {}, {}, {}, {}
  for m, width, count in (("t", text, 1), ("v", 4 * vision, 1), ("a", 4 * audio, 3)):
    norms[m] = add(f"{m}layer_norm", nn.LayerNorm(4 * text if m == "t" else width // 2))
    project[m] = add(f"project_{m}.project_{m}", nn.Linear(width, hidden))
    project_norm[m] = add(f"project_{m}.project_{m}_layer_norm", nn.LayerNorm(hidden))
    private[m] = add(f"private_{m}.private_{m}_{count}", nn.Linear(hidden, hidden))
    recon[m] = add(f"recon_{m}.recon_{m}_1", nn.Linear(hidden, hidden))
  shared = add("shared.shared_1", nn.Linear(hidden, hidden))
  judge = add("sp_discriminator.sp_discriminator_layer_1", nn.Linear(hidden, 4))
  head1 = add("fusion.fusion_layer_1", nn.Linear(6 * hidden, 3 * hidden))
  head2 = add("fusion.fusion_layer_3", nn.Linear(3 * hidden, classes or 1))
  fusion = add("transformer_encoder.layers.0", nn.TransformerEncoderLayer(hidden, 2).eval())

  mask = (torch.arange(lengths[0]) < torch.tensor(valid)[:, None]).float()
  ids = torch.randint(1, vocabulary, (rows, lengths[0])) * mask.long()
  segments = torch.randint(0, 2, ids.shape)
  x_audio, x_vision = (torch.randn(rows, n, d) for n, d in zip(lengths[1:], dims[1:], strict=True))
  labels = torch.randint(0, classes, (rows,)) if classes else torch.randn(rows, 1)

  states = first_norm(words(ids) + places(torch.arange(lengths[0])) + kinds(segments))
  for block in blocks:
    states = block(states, src_key_padding_mask=mask == 0)
  out, utterance = {}, {"t": (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)}
  for m, x in (("v", x_vision), ("a", x_audio)):
    pack = lambda x: nn.utils.rnn.pack_padded_sequence(  # noqa: E731
      x, torch.tensor(valid), batch_first=True, enforce_sorted=False
    )
    h, (first, _) = rnns[f"{m}rnn1"](pack(x))
    h = norms[m](nn.utils.rnn.pad_packed_sequence(h, batch_first=True)[0])
    _, (second, _) = rnns[f"{m}rnn2"](pack(h))
    utterance[m] = torch.cat([first, second], 2).permute(1, 0, 2).reshape(rows, -1)
  for m in "tva":
    original = project_norm[m](torch.relu(project[m](utterance[m])))
    out[f"utt_{m}_orig"] = original
    out[f"utt_private_{m}"] = torch.sigmoid(private[m](original))
    out[f"utt_shared_{m}"] = torch.sigmoid(shared(original))
    out[f"utt_{m}"] = out[f"utt_private_{m}"] + out[f"utt_shared_{m}"]
    out[f"utt_{m}_recon"] = recon[m](out[f"utt_{m}"])
    out[f"shared_or_private_p_{m}"] = judge(out[f"utt_private_{m}"])
  out["shared_or_private_s"] = judge(sum(out[f"utt_shared_{m}"] for m in "tva") / 3)
  tokens = torch.stack([out[f"utt_{kind}_{m}"] for kind in ("private", "shared") for m in "tva"])
  fused = fusion(tokens)
  out["M"] = head2(torch.relu(head1(torch.cat(list(fused), 1))))

  def difference(a, b):
    a, b = (z - z.mean(0) for z in (a, b))
    a, b = (z / (z.norm(dim=1, keepdim=True).detach() + 1e-6) for z in (a, b))
    return (a.T @ b).pow(2).mean()

  def discrepancy(a, b):
    total = (a.mean(0) - b.mean(0)).norm()
    for k in range(2, 6):
      total = total + ((a - a.mean(0)) ** k).mean(0).sub(((b - b.mean(0)) ** k).mean(0)).norm()
    return total

  p, s = ({m: out[f"utt_{kind}_{m}"] for m in "tva"} for kind in ("private", "shared"))
  task = nn.functional.cross_entropy if classes else nn.functional.mse_loss
  loss = {
    "cls": task(out["M"], labels),
    "diff": sum(difference(p[m], s[m]) for m in "tva")
    + sum(difference(p[m], p[n]) for m, n in ("at", "av", "tv")),
    "cmd": sum(discrepancy(s[m], s[n]) for m, n in itertools.combinations("tva", 2)) / 3,
    "recon": sum((out[f"utt_{m}_recon"] - out[f"utt_{m}_orig"]).pow(2).mean() for m in "tva") / 3,
  }
  loss["total"] = loss["cls"] + sum(
    w * loss[part] for w, part in zip(weights, ("diff", "cmd", "recon"), strict=True)
  )
  loss["total"].backward()

  def published(state):
    """BERT's own names for what PyTorch's encoder layer holds."""
    for key, value in state.items():
      name = key.replace("/", ".")
      if not name.startswith("block."):
        yield name, value
        continue
      n, part = name.removeprefix("block.").split(".", 1)
      layer, kind = f"{at}.encoder.layer.{n}", part.split("_")[-1].split(".")[-1]
      if part.startswith("self_attn.in_proj"):
        for role, third in zip(("query", "key", "value"), np.split(value, 3), strict=True):
          yield f"{layer}.attention.self.{role}.{kind}", third
      else:
        where = {
          "self_attn.out_proj": "attention.output.dense",
          "norm1": "attention.output.LayerNorm",
          "linear1": "intermediate.dense",
          "linear2": "output.dense",
          "norm2": "output.LayerNorm",
        }[part.rpartition(".")[0]]
        yield f"{layer}.{where}.{kind}", value

  parameters = dict(names.named_parameters())
  values = {name: p.detach().numpy() for name, p in parameters.items()}
  grads = {
    name: np.zeros_like(values[name]) if p.grad is None else p.grad.numpy()
    for name, p in parameters.items()
  }
  settings = dict(
    hidden_size=hidden,
    diff_weight=weights[0],
    sim_weight=weights[1],
    recon_weight=weights[2],
    rnncell="lstm",
    num_classes=classes or 3,
    train_mode="classification" if classes else "regression",
    bert_config=dict(
      hidden_size=text,
      num_hidden_layers=layers,
      num_attention_heads=heads,
      intermediate_size=2 * text,
      vocab_size=vocabulary,
      max_position_embeddings=positions,
    ),
  )
  return {
    "config": json.dumps(settings),
    "input/text_bert": torch.stack([ids.float(), mask, segments.float()], 1).numpy(),
    "input/audio": x_audio.numpy(),
    "input/vision": x_vision.numpy(),
    "input/labels": labels.numpy(),
    "mid/fusion_transformer": fused.detach().numpy(),
    **{f"output/{name}": value.detach().numpy() for name, value in out.items()},
    **{f"loss/{name}": value.detach().numpy() for name, value in loss.items()},
    **{f"param/{name}": value for name, value in published(values)},
    **{f"grad/{name}": value for name, value in published(grads)},
  }
