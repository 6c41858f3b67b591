"""A compressed model in memory beside the dense one, by turns in this process: time to load, resident bits
per weight of its packed layers after a forward pass, decoding and prefill.

The best of --repeats, on as many threads as torch has. Example:
  python scripts/bench_loaded.py smol-4x SmolLM2-135M
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import lrsd  # noqa: F401 - registers the loader
from lrsd.forms.packed import PackedLinear


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("compressed", type=Path)
    options.add_argument("dense", help="a directory of safetensors, in bfloat16")
    options.add_argument("--tokens", type=int, default=24, help="tokens to decode, at batch 1")
    options.add_argument("--batch", type=int, default=32, help="sequences of 32 tokens to prefill")
    options.add_argument("--repeats", type=int, default=3)
    args = options.parse_args()
    names = {"compressed": str(args.compressed), "dense": args.dense}
    models: dict[str, Any] = {}
    seconds: dict[str, dict[str, float]] = {what: {} for what in ("load", "decode a token", "prefill")}
    prompt = torch.arange(3, 11)[None]
    batch = torch.arange(3, 35).repeat(args.batch, 1)

    @torch.inference_mode()
    def measure(what: str, name: str, call: Callable[[], object], per: int = 1) -> None:
        start = time.perf_counter()
        call()
        taken = (time.perf_counter() - start) / per
        seconds[what][name] = min(taken, seconds[what].get(name, taken))

    def load(name: str) -> None:
        models[name] = AutoModelForCausalLM.from_pretrained(names[name], dtype=torch.bfloat16).eval()

    def decode(name: str, tokens: int) -> None:
        models[name].generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    for name in names:  # compiles what is compiled at first use
        load(name)
        decode(name, 2)
    for _ in range(args.repeats):
        for name in names:
            measure("load", name, lambda name=name: load(name))  # type: ignore[misc]
        for name in names:
            decode(name, 2)
            measure("decode a token", name, lambda name=name: decode(name, args.tokens), args.tokens)  # type: ignore[misc]
            measure("prefill", name, lambda name=name: models[name](batch))  # type: ignore[misc]
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"resident bits per weight of the packed layers: {resident_bits(models['compressed']):.2f}")
    for what, taken in seconds.items():
        ratio = taken["compressed"] / taken["dense"]
        print(f"{what}: {taken['compressed']:.4f} s, dense {taken['dense']:.4f} s = {ratio:.2f} x")


def resident_bits(model: PreTrainedModel) -> float:
    """Of the packed layers, per weight."""
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return 8 * sum(layer.resident_bytes() for layer in layers) / weights


if __name__ == "__main__":
    main()
