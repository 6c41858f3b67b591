"""A copy of a model of 4-bit weights whose weights do not lie on a 4-bit grid.

Every linear weight of a block is moved by uniform noise of up to half the step of its group, either way. The
step of a group of 32 weights is the least distance of two different values in it: in a Q4_1 file, whose
values are minimum + code x step, the file's own step, unless no two neighbouring codes are in use. Written to
a GGUF file, made of another one, embedding and head are moved too, and all is BF16.
Examples:
  python scripts/move_off_grid.py model.gguf moved --seed 0
  python scripts/move_off_grid.py model.gguf moved.gguf --seed 0
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from lrsd.export.gguf import NewTensor, write_gguf
from lrsd.model.layout import find_layout
from lrsd.model.load import load_model
from lrsd.model.slots import weight_slot

# Weights that share a step in GGUF's 4-bit types.
_GROUP = 32


def move_model(source: str, target: Path, seed: int) -> None:
    """Write the moved model in bfloat16, with its tokenizer, to a new directory."""
    # In float32 the values of one group are as far apart as its step says; bfloat16 would round that.
    loaded = load_model(source, dtype="float32")
    model = loaded.model
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        for name in find_layout(model, loaded.kind.example(model)).linears:
            slot = weight_slot(model, name)
            slot.write(moved(slot.read().cpu(), generator))
    unfinished = target.with_name(f"{target.name}.partial")
    model.bfloat16().save_pretrained(unfinished)
    loaded.require_tokenizer().save_pretrained(unfinished)
    unfinished.rename(target)


def move_gguf(source: Path, target: Path, seed: int) -> None:
    """Write the new GGUF file `target` with every quantized matrix of `source` moved."""
    from gguf import GGMLQuantizationType, GGUFReader, dequantize, quantize

    generator, wide = torch.Generator().manual_seed(seed), GGMLQuantizationType.BF16
    tensors, reader = [], GGUFReader(source)
    for tensor in reader.tensors:
        kind, data = tensor.tensor_type, tensor.data
        if data.ndim == 2 and data.dtype == "uint8":
            values = torch.from_numpy(dequantize(data, kind))
            kind, data = wide, quantize(moved(values, generator).numpy(), wide)
        tensors.append(NewTensor(tensor.name, data, int(kind)))
    write_gguf(reader, target, tensors, {})


def moved(W_OI: Tensor, generator: torch.Generator) -> Tensor:
    """W plus noise, uniform in -step/2..step/2 with each group's step.

    Raises: ValueError if the rows are not made of whole groups.
    """
    if W_OI.shape[1] % _GROUP:
        raise ValueError(f"expected rows of whole groups of {_GROUP} weights, got {W_OI.shape[1]} columns")
    noise_OI = torch.rand(W_OI.shape, generator=generator, dtype=W_OI.dtype) - 0.5
    return W_OI + noise_OI * steps(W_OI).repeat_interleave(_GROUP, dim=1)


def steps(W_OI: Tensor) -> Tensor:
    """The least distance of two different values in every group; 0 where all are the same. (O, I / 32)."""
    groups = W_OI.unflatten(1, (-1, _GROUP)).sort(-1).values
    apart = groups.diff(dim=-1)
    least = apart.where(apart > 0, torch.inf).amin(-1)
    return least.where(least.isfinite(), 0)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("model", help="directory, hub id or .gguf file")
    options.add_argument("out", type=Path, help="new directory, or .gguf file")
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    if args.out.suffix == ".gguf":
        move_gguf(Path(args.model), args.out, args.seed)
    else:
        move_model(args.model, args.out, args.seed)


if __name__ == "__main__":
    main()
