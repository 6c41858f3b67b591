"""Driver of GPTQModel: GPTQ on given tokens; settings are its QuantizeConfig's; see common.py."""

import os

import torch
from common import (
    Clock,
    finish,
    linear_names,
    load_dense,
    load_tokens,
    read_job,
    speed_up_products,
    stored_bytes,
    unpacked_gptq,
)
from safetensors.torch import load_file


def main() -> None:
    # It asks for two workers, of which it has one on a machine of two cores, and ends there.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, ((os.cpu_count() or 1) + 1) // 2)))
    from gptqmodel import GPTQModel, QuantizeConfig

    job = read_job()
    tokens = load_tokens(job)
    speed_up_products()
    clock = Clock()
    model = GPTQModel.load(str(job.dense), QuantizeConfig(device="cpu", **job.settings))
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    model.quantize(rows, batch_size=1)
    model.save(str(job.saved))
    measured = clock.stop()
    del model
    names = linear_names(load_dense(job.dense))
    finish(
        job,
        measured,
        unpacked(job.saved, names, job.settings["bits"]),
        stored_bytes(job.saved, names, job.dense),
    )


def unpacked(saved, names, bits):
    stored = {}
    for path in sorted(saved.glob("*.safetensors")):
        stored |= load_file(path)
    for name in names:
        parts = ("qweight", "qzeros", "scales", "g_idx")
        layer = {part: stored[f"{name}.{part}"] for part in parts if f"{name}.{part}" in stored}
        yield name, unpacked_gptq(layer, bits).to(torch.bfloat16)


if __name__ == "__main__":
    main()
