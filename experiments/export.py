"""Stores a trained model as one file that serves predictions, see `mmjax.serving`.

python -m experiments.export --workdir=runs/misa-m3s --out=misa.jaxexport
"""

from absl import flags

from mmjax import runs, serving

from . import cli, samples

_FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of a training run.", flag_values=_FLAGS)
_OUT = flags.DEFINE_string("out", "", "The .jaxexport file that is written.", flag_values=_FLAGS)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", None, "Rows of a batch; any number if unset.", lower_bound=1, flag_values=_FLAGS
)
_PLATFORMS = flags.DEFINE_list(
  "platforms", [], "Where it shall run: cpu, cuda, tpu; here if unset.", flag_values=_FLAGS
)


@cli.binary(_FLAGS, __doc__, required=["workdir", "out"])
def main():
  samples.check("out", _OUT.value, [".jaxexport"])
  platforms = cli.some_of("platforms", _PLATFORMS.value or ["cpu"], ["cpu", "cuda", "rocm", "tpu"])
  run = runs.load(_WORKDIR.value)
  exported = serving.export(
    run, batch_size=_BATCH_SIZE.value, platforms=platforms if _PLATFORMS.value else None
  )
  content = exported.serialize()
  samples.write(_OUT.value, lambda file: file.write(content))
  size = len(content) / 2**20
  print(f"Epoch {run.epoch} of {_WORKDIR.value} ({size:.1f} MiB): {_OUT.value}. To serve it:")
  print(f"  jax.jit(mmjax.serving.read({_OUT.value!r}).call)(batch)")


if __name__ == "__main__":
  main()
