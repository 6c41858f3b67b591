"""Driver of this program: `lrsd compress --ratio`, on the same samples of the same text; see common.py.

settings: "calib", "samples", "seqlen" and "seed", by which it draws what is in TOKENS itself; others are
options of its own, of which "bytes" stands for the ratio that fills so many.
"""

from common import Clock, finish, linear_names, load_dense, load_tokens, read_job, stored_bytes
from safetensors.torch import load_file

from lrsd.compress import compress
from lrsd.export.dense import export_dense
from lrsd.recipe import Recipe


def main() -> None:
    job = read_job()
    model = load_dense(job.dense)
    names = linear_names(model)
    settings = dict(job.settings)
    if nbytes := settings.pop("bytes", None):
        settings["ratio"] = sum(2 * model.get_submodule(name).weight.numel() for name in names) / nbytes
    del model
    assert load_tokens(job).shape == (settings["samples"], settings["seqlen"])
    clock = Clock()
    compress(str(job.dense), job.saved, Recipe.of(**settings))
    measured = clock.stop()
    export_dense(job.saved, job.out / "plain")
    plain = {}
    for shard in sorted((job.out / "plain").glob("*.safetensors")):
        plain |= load_file(shard)
    weights = ((name, plain[f"{name}.weight"]) for name in names)
    finish(job, measured, weights, stored_bytes(job.saved, names, job.dense))


if __name__ == "__main__":
    main()
