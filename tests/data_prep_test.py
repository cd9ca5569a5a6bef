import collections
import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import tracemalloc
import types

import numpy as np
import pytest

from command import ROOT
from data_prep import card, convert
from mmjax import data, files, padding, synthetic, unpickle

ARRAYS = synthetic.make_arrays(seed=2, num_train=12, num_valid=4, num_test=4)


def edited(split, key, value):
  """The arrays with one field replaced, or removed if the value is None."""
  arrays = copy.deepcopy(ARRAYS)
  if value is None:
    del arrays[split][key]
  else:
    arrays[split][key] = value
  return arrays


# -- unpickling ------------------------------------------------------------------------------


class Evil:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_a_command_is_refused_by_name(tmp_path, protocol):
  path, trace = tmp_path / "evil.pkl", tmp_path / "trace"
  path.write_bytes(pickle.dumps({"train": Evil(trace)}, protocol))
  with pytest.raises(unpickle.UnpickleError, match=r"evil\.pkl.*(posix|nt)\.system"):
    unpickle.load(path)
  assert not trace.exists()


@pytest.mark.parametrize(
  "name",
  [
    "builtins.eval",
    "builtins.getattr",
    "numpy.load",
    "numpy.f2py.compile",
    "operator.attrgetter",
    "numpy.core.multiarray.fromfile",
    "numpy.dtypes.os.system",
  ],
)
def test_other_globals_are_refused(tmp_path, name):
  module, _, attribute = name.rpartition(".")
  (tmp_path / "a.pkl").write_bytes(f"c{module}\n{attribute}\n.".encode())
  with pytest.raises(unpickle.UnpickleError, match=name):
    unpickle.load(tmp_path / "a.pkl")


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_plain_containers_are_read_at_every_protocol(tmp_path, protocol, core):
  value = {
    "f": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "s": np.array(["好", "b"]),
    "o": np.array(["x", None], object),
    "scalar": np.float64(0.1),
    "plain": [1, (2.5, None, True), {"é"}, b"\xff", bytearray(b"a"), 1j],
    "ordered": collections.OrderedDict(a=1),
    "dtype": np.dtype("<i4"),
  }
  written = pickle.dumps(value, protocol)
  if protocol < 4:  # below, names stand in the text and can be exchanged
    written = written.replace(b"numpy._core", core.encode())
  (tmp_path / "a.pkl").write_bytes(written)
  read = unpickle.load(tmp_path / "a.pkl")
  assert read.keys() == value.keys()
  for key in ("f", "s", "o"):
    np.testing.assert_array_equal(read[key], value[key])
    assert read[key].dtype == value[key].dtype
  for key in ("scalar", "plain", "ordered", "dtype"):
    assert read[key] == value[key] and type(read[key]) is type(value[key])


def test_a_python_2_pickle_is_read(tmp_path):
  """Byte strings outside of ASCII, and an array whose buffer is one, as Python 2 wrote them."""
  raw = np.array([1.5, -3e-30], np.float32)
  array = (
    b"cnumpy.core.multiarray\n_reconstruct\n"
    b"cnumpy\nndarray\n"
    b"K\x00\x85"
    b"U\x01b\x87R"
    b"(K\x01"
    b"K\x02\x85"
    b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"
    b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    b"\x89"
    b"U\x08" + raw.tobytes() + b"tb"
  )
  (tmp_path / "a.pkl").write_bytes(b"\x80\x02}(U\x04caf\xe9U\x01xU\x01a" + array + b"u.")
  read = unpickle.load(tmp_path / "a.pkl")
  assert read["café"] == "x"
  np.testing.assert_array_equal(read["a"], raw)


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps(ARRAYS)[:-200]])
def test_a_broken_file_is_named(tmp_path, content):
  (tmp_path / "cut.pkl").write_bytes(content)
  with pytest.raises(data.DataError, match=r"cut\.pkl: this is no whole pickle"):
    files.read([tmp_path / "cut.pkl"])


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(data.DataError, match=r"gone\.pkl: there is no such file"):
    files.read([tmp_path / "gone.pkl"])


# -- converting ------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_what_is_read_back_is_bit_identical(tmp_path, file_format):
  arrays = copy.deepcopy(ARRAYS)
  arrays["train"]["audio"][0, 0, :4] = [1e-42, -0.0, np.float32(3.4e38), 1 / 3]
  arrays["train"]["raw_text"] = np.array(["很好 ☃", ""] * 6)
  for letter in "TAV":
    for fields in arrays.values():
      fields[f"regression_labels_{letter}"] = np.linspace(-1, 1, len(fields["id"]))
  path = synthetic.write_pickle(tmp_path / "a.pkl", arrays)
  convert.convert(path, "any", tmp_path / "data", file_format=file_format)
  read = data.read_arrays(tmp_path / "data", "any")
  for split, fields in arrays.items():
    assert read[split].keys() == fields.keys()
    for key, value in fields.items():
      value = np.asarray(value)
      if value.dtype.kind == "U":
        assert read[split][key].tolist() == value.tolist()
      else:
        assert read[split][key].dtype == value.dtype
        assert read[split][key].tobytes() == value.tobytes(), key


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
  folder = tmp_path_factory.mktemp("converted")
  arrays = copy.deepcopy(ARRAYS)
  arrays["test"]["id"] = ["video000$_$99", *arrays["test"]["id"][1:]]
  convert.convert(synthetic.write_pickle(folder / "a.pkl", arrays), "any", folder / "data")
  return folder


def test_the_card_tells_what_was_converted(converted):
  found = data.read_card(converted / "data", "any")
  assert found["rows"] == {"train": 12, "valid": 4, "test": 4}
  lengths = ARRAYS["train"]["audio_lengths"]
  assert found["lengths"]["train"]["audio"]["max"] == max(lengths)
  steps = np.concatenate([x[:n] for x, n in zip(ARRAYS["train"]["audio"], lengths, strict=True)])
  np.testing.assert_allclose(found["standardize"]["audio"]["mean"], steps.mean(0), atol=1e-5)
  np.testing.assert_allclose(found["standardize"]["audio"]["std"], steps.std(0), rtol=1e-4)
  assert [v["video"] for v in found["videos_in_two_splits"]] == ["video000"]
  assert sum(found["labels"]["train"]["regression_labels"].values()) == 12


def test_a_dataset_is_replaced_on_demand_only(converted):
  before = data.read_card(converted / "data", "any")
  with pytest.raises(data.DataError, match="--overwrite"):
    convert.convert(converted / "a.pkl", "any", converted / "data")
  synthetic.write_pickle(converted / "bad.pkl", edited("train", "audio", None))
  with pytest.raises(data.DataError, match="audio"):
    convert.convert(converted / "bad.pkl", "any", converted / "data", overwrite=True)
  assert data.read_card(converted / "data", "any") == before  # a fault costs nothing
  convert.convert(converted / "a.pkl", "any", converted / "data", overwrite=True)
  assert data.read_card(converted / "data", "any") == before
  assert [path.name for path in (converted / "data").iterdir()] == ["any"]


def test_a_modality_that_is_absent_has_no_statistics(tmp_path):
  arrays = copy.deepcopy(ARRAYS)
  for fields in arrays.values():
    fields["vision"][:], fields["vision_lengths"] = 0, [0] * len(fields["id"])
  path = synthetic.write_pickle(tmp_path / "a.pkl", arrays)
  folder = convert.convert(path, "any", tmp_path / "data")

  def refuse(name):
    raise AssertionError(name)  # NaN is no JSON

  found = json.loads((folder / "card.json").read_text(), parse_constant=refuse)
  assert found["standardize"].keys() == {"audio"}
  assert found["lengths"]["train"]["vision"] == {"min": 0, "mean": 0, "max": 0}


def test_what_was_padded_in_front_is_stored_straight(tmp_path):
  arrays = copy.deepcopy(ARRAYS)
  for fields in arrays.values():
    x, lengths = fields["audio"], fields["audio_lengths"]
    fields["audio"] = np.stack(
      [np.roll(row, len(row) - n, 0) for row, n in zip(x, lengths, strict=True)]
    )
  path = synthetic.write_pickle(tmp_path / "a.pkl", arrays)
  convert.convert(path, "any", tmp_path / "data")
  for split, fields in data.read_arrays(tmp_path / "data", "any").items():
    np.testing.assert_array_equal(fields["audio"], ARRAYS[split]["audio"])
  found = data.read_card(tmp_path / "data", "any")
  moved = found["moved"]["train"]["audio"]
  assert f"note: train/audio: {moved} of 12 rows were padded in front" in card.to_text(found)


def test_a_conversion_holds_its_arrays_once(tmp_path, monkeypatch):
  """Beside the file's size there are only blocks and rows."""
  monkeypatch.setattr(padding, "_BLOCK", 1 << 18)
  arrays = synthetic.make_arrays(seed=0, num_train=200, num_valid=50, num_test=50)
  for fields in arrays.values():  # 300 rows of 80 kB
    fields["audio"] = np.tile(fields["audio"], (1, 10, 8))
    fields["audio_lengths"] = [300] * len(fields["id"])
  arrays["train"]["audio"][0, 0, 0] = -np.inf  # mended in place
  path = synthetic.write_pickle(tmp_path / "a.pkl", arrays)
  del arrays, fields
  tracemalloc.start()
  convert.convert(path, "any", tmp_path / "data")
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 1.25 * path.stat().st_size


def run(module, *flags):
  command = [sys.executable, "-m", f"data_prep.{module}", *flags]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_inspect_prints_the_card_again(converted):
  found = run("inspect", "--dataset=any", f"--data_dir={converted / 'data'}")
  assert found.returncode == 0
  assert found.stdout.strip() == card.to_text(data.read_card(converted / "data", "any"))
  missing = run("inspect", "--dataset=none", f"--data_dir={converted / 'data'}")
  assert missing.returncode == 1 and "mmjax-prepare" in missing.stderr
  assert "Traceback" not in missing.stderr


def test_a_killed_conversion_leaves_nothing_that_looks_complete(tmp_path):
  arrays = synthetic.make_arrays(seed=0, num_train=2000, num_valid=20, num_test=20)
  path, target = synthetic.write_pickle(tmp_path / "a.pkl", arrays), tmp_path / "data"
  flags = [f"--pickle={path}", "--dataset=any", f"--data_dir={target}"]
  process = subprocess.Popen(
    [sys.executable, "-m", "data_prep.convert", *flags],
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  while not list(target.glob(".incomplete-any/any/*")):
    assert process.poll() is None
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  with pytest.raises(data.DataError, match="no complete dataset"):
    data.load(target, "any")
  done = run("convert", *flags)
  assert done.returncode == 0 and "rows     train 2000" in done.stdout
  assert done.stderr == ""  # no bars, no chatter of TensorFlow's
  assert data.load(target, "any").spec.num_train == 2000
  assert [path.name for path in target.iterdir()] == ["any"]


def test_rows_are_read_some_megabytes_at_a_time():
  """512 rows, but fewer where they are large."""
  sizes = []
  for entries in (0, 10, 1 << 14, 1 << 20, 1 << 26):
    feature = types.SimpleNamespace(shape=(entries,), np_dtype=np.float32)
    builder = types.SimpleNamespace(
      info=types.SimpleNamespace(features={"x": feature}, file_format="tfrecord"),
      as_dataset=lambda split, batch_size, shuffle_files: sizes.append(batch_size) or {},
    )
    list(data._batches(builder, "train"))
  assert sizes == [512, 512, 512, 8, 1]
