"""The systems by name: `MODELS[name](**settings) -> System`."""

from mmjax.models import almt, cenet, lnln, misa, mmim, mmin, self_mm, tetfn, tfr_net

MODELS = {
  "almt": almt.make,
  "cenet": cenet.make,
  "lnln": lnln.make,
  "misa": misa.make,
  "mmim": mmim.make,
  "mmin": mmin.make,
  "self_mm": self_mm.make,
  "tetfn": tetfn.make,
  "tfr_net": tfr_net.make,
}
