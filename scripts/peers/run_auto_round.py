"""Driver of AutoRound on given tokens; settings are its own, see common.py. Its format is AutoGPTQ's."""

from auto_round import AutoRound
from common import Clock, finish, linear_names, load_dense, load_tokens, read_job, stored_bytes
from run_gptqmodel import unpacked
from transformers import AutoTokenizer


def main() -> None:
    job = read_job()
    tokens = load_tokens(job)
    clock = Clock()
    model = load_dense(job.dense)
    names = linear_names(model)
    settings = {"batch_size": 8, **job.settings}
    batches = list(tokens.split(settings["batch_size"]))
    AutoRound(
        model, AutoTokenizer.from_pretrained(job.dense), dataset=batches, nsamples=tokens.shape[0],
        seqlen=tokens.shape[1], device_map="cpu", **settings,
    ).quantize_and_save(str(job.saved), format="auto_round")  # fmt: skip
    measured = clock.stop()
    folder = next(job.saved.rglob("*.safetensors")).parent  # one within, named after the settings
    weights = unpacked(folder, names, settings["bits"])
    finish(job, measured, weights, stored_bytes(folder, names, job.dense))


if __name__ == "__main__":
    main()
