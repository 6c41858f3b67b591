"""Driver of HQQ, which reads no calibration text: settings are `hqq_base_quant_config`'s; see common.py."""

import torch
from common import Clock, finish, linear_names, load_dense, read_job, stored_bytes
from hqq.core.quantize import HQQLinear, hqq_base_quant_config
from safetensors.torch import save_file


def main() -> None:
    job = read_job()
    clock = Clock()
    model = load_dense(job.dense)
    layers = {}
    for name in linear_names(model):
        layers[name] = HQQLinear(
            model.get_submodule(name), hqq_base_quant_config(**job.settings), del_orig=False,
            compute_dtype=torch.bfloat16, device="cpu",
        )  # fmt: skip
    # What its own safetensors files hold: the state of each layer, integers packed, scales and zeros.
    tensors = {
        f"{name}.{key}": value.contiguous()
        for name, layer in layers.items()
        for key, value in layer.state_dict().items()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    }
    job.saved.mkdir(exist_ok=True)
    save_file(tensors, job.saved / "model.safetensors")
    measured = clock.stop()
    weights = ((name, layer.dequantize()) for name, layer in layers.items())
    finish(job, measured, weights, stored_bytes(job.saved, layers, job.dense))


if __name__ == "__main__":
    main()
