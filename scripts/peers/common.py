"""What the drivers of tools share: arguments, time and memory, bytes stored, the dense copy that is measured.

A driver runs in its tool's own environment, which has torch, transformers and safetensors but not lrsd:

  python run_hqq.py DENSE TOKENS OUT '{"nbits": 4, "group_size": 64}'

TOKENS is a safetensors file of calibration tokens. In OUT it leaves result.json and OUT/dense, the model with
the weights that the tool's own files hold, taken out of its format, all else being DENSE's.
"""

import json
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """What a driver is asked for. saved: where the tool is to write its own files."""

    dense: Path
    tokens: Path
    out: Path
    settings: dict[str, Any]

    @property
    def saved(self) -> Path:
        return self.out / "saved"


def read_job() -> Job:
    """From the command line; OUT is made."""
    dense, tokens, out, settings = sys.argv[1:]
    Path(out).mkdir(parents=True, exist_ok=True)
    return Job(Path(dense), Path(tokens), Path(out), json.loads(settings))


class Clock:
    """Of what the tool does with a model: loading and writing included, imports not. Children are included.

    Processor seconds tell more than the clock's on a machine that has other work. The peak is the largest
    process's, what its libraries take included.
    """

    def __init__(self) -> None:
        self.start = time.perf_counter(), _processor_seconds()

    def stop(self) -> dict[str, float]:
        wall, processor = self.start
        return {
            "seconds": time.perf_counter() - wall,
            "cpu seconds": _processor_seconds() - processor,
            "peak bytes": _peak_bytes(),
        }


def load_dense(directory: Path) -> Any:
    """The model in bfloat16; from here on products are as fast as this processor makes them."""
    import torch
    from transformers import AutoModelForCausalLM

    speed_up_products()
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


def speed_up_products() -> None:
    """On a CPU without instructions for bfloat16, linear layers go by way of float32: five times as fast.

    Sums are of float32 numbers and rounded at the end, as they are where there are such instructions.
    """
    import torch
    from torch.nn import functional

    if torch.ops.mkldnn._is_mkldnn_bf16_supported() or hasattr(functional, "plain_linear"):
        return
    plain = functional.plain_linear = functional.linear

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        if x.dtype != torch.bfloat16 or x.device.type != "cpu":
            return plain(x, weight, bias)
        return plain(x.float(), weight.float(), None if bias is None else bias.float()).bfloat16()

    functional.linear = linear


def load_tokens(job: Job) -> Any:
    """(samples, tokens per sample) int64."""
    from safetensors.torch import load_file

    return load_file(job.tokens)["tokens"]


def linear_names(model: Any) -> list[str]:
    """The linear layers, all but the head: what every tool here compresses."""
    import torch

    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]


def stored_bytes(saved: Path, names: Iterable[str], dense: Path) -> int:
    """Of all tensors of these layers in a directory of safetensors files: codes, scales, whatever there is.

    Left out are biases that `dense`, the directory of the model as it was, has too.
    """
    wanted, original = set(names), _tensor_bytes(dense)
    biases = {key for key in original if key.endswith(".bias")}
    return sum(
        size
        for key, size in _tensor_bytes(saved).items()
        if key not in biases and not wanted.isdisjoint(_parents(key))
    )


def finish(job: Job, measured: dict[str, float], weights: Iterable[tuple[str, Any]], stored: int) -> None:
    """Write OUT/dense and result.json. Last of all: the peak of memory was taken before.

    weights: (O, I) by layer, as the tool's files hold them. stored: their bytes there.
    Raises: ValueError if they are not those of all linear layers, or not finite.
    """
    import torch

    model = load_dense(job.dense)
    left = dict.fromkeys(linear_names(model))
    count, errors = 0, []
    with torch.no_grad():
        for name, W_OI in weights:
            del left[name]
            slot = model.get_submodule(name).weight
            if W_OI.shape != slot.shape or not W_OI.isfinite().all():
                raise ValueError(f"{name}: expected finite {tuple(slot.shape)}, got {tuple(W_OI.shape)}")
            errors.append(float((W_OI.float() - slot.float()).norm() / slot.float().norm()))
            slot.copy_(W_OI)
            count += slot.numel()
    if left:
        raise ValueError(f"the tool stored nothing for {', '.join(left)}")
    model.save_pretrained(job.out / "dense")
    result = {"bytes": stored, "weights": count, "relative error": sorted(errors)[len(errors) // 2]}
    versions = {"torch": version("torch"), "transformers": version("transformers")}
    (job.out / "result.json").write_text(json.dumps(measured | result | {"versions": versions}))


def unpacked_gptq(tensors: dict[str, Any], bits: int) -> Any:
    """The weight (O, I) of a layer in the format of AutoGPTQ, which GPTQModel and AutoRound write.

    Codes of an output stand along the inputs, those of the zeros along the outputs, as one stream of bits in
    words of 32 bits, the lowest first; zeros are stored less one.
    """
    import torch

    codes_IO = _integers(tensors["qweight"].T, bits).T
    scales_GO = tensors["scales"].float()
    zeros_GO = _integers(tensors["qzeros"], bits) + 1
    if "g_idx" in tensors:
        group_I = tensors["g_idx"].long()
    else:
        group_I = torch.arange(codes_IO.shape[0]) // (codes_IO.shape[0] // scales_GO.shape[0])
    return ((codes_IO - zeros_GO[group_I]) * scales_GO[group_I]).T


def _integers(words: Any, bits: int) -> Any:
    """(rows, words) int32 of `bits` bits each, as (rows, integers) int64."""
    import torch

    stream = (words.long()[..., None] >> torch.arange(32)) & 1
    stream = stream.flatten(1).unflatten(1, (-1, bits))
    return (stream << torch.arange(bits)).sum(-1)


def _tensor_bytes(directory: Path) -> dict[str, int]:
    sizes = {}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for key, entry in header.items():
            if key != "__metadata__":
                begin, end = entry["data_offsets"]
                sizes[key] = end - begin
    return sizes


def _parents(key: str) -> set[str]:
    """Example: "a.b.c" is in "a.b" and "a"."""
    parts = key.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def _processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _peak_bytes() -> int:
    """ru_maxrss of a process includes what its parent held when it started; Linux's VmHWM does not."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    status = Path("/proc/self/status")
    if not status.exists():  # macOS counts bytes
        return max(children, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    own = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * max(children, own)
