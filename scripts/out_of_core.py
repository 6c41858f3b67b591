"""Compress a synthetic checkpoint of several times the memory that the process may have.

Writes random bfloat16 weights tensor by tensor, then runs `lrsd compress` in a cgroup whose memory is
capped, which kills it if it needs more; compares the peak with the prediction. Needs root, or a control
group that may be written to, and about one and a half times the checkpoint of disk.
Example:
  python scripts/out_of_core.py --cap 1.15GB --layers 156 --directory /scratch -- --no-propagate
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lrsd.settings import parse_size

_GROUPS = Path("/sys/fs/cgroup")


def write_checkpoint(directory: Path, config: LlamaConfig) -> int:
    """A Llama of random weights, one shard per block. Returns: bytes of its weights."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    config.save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        block = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(f"model-{block}.safetensors", {})[name] = parameter.shape
    weight_map: dict[str, str] = {}
    total = 0
    for shard, shapes in shards.items():
        tensors = {
            name: (torch.randn(shape, generator=generator) * (0.02 if len(shape) > 1 else 0.1)
                   + (len(shape) == 1)).bfloat16()
            for name, shape in shapes.items()
        }  # fmt: skip
        save_file(tensors, directory / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    letters = {chr(code): code for code in range(config.vocab_size)}
    words = Tokenizer(models.WordLevel(letters, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(directory)
    return total


class ControlGroup:
    """A cgroup with a memory limit, of either version; removed at the end."""

    def __init__(self, cap: int) -> None:
        first = (_GROUPS / "memory").is_dir()
        self._path = (_GROUPS / "memory" if first else _GROUPS) / f"lrsd-{os.getpid()}"
        self._path.mkdir()
        (self._path / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(cap))

    def enter(self) -> None:
        (self._path / "cgroup.procs").write_text(str(os.getpid()))

    def remove(self) -> None:
        self._path.rmdir()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--cap", default="1.15GB", help="memory that the control group allows")
    options.add_argument("--layers", type=int, default=156)
    options.add_argument("--hidden", type=int, default=1024)
    options.add_argument("--intermediate", type=int, default=2816)
    options.add_argument("--directory", default=None, help="where checkpoint and output go (temporary files)")
    options.add_argument(
        "more", nargs="*", default=["--no-propagate"],
        help="further options of lrsd compress, behind -- (--no-propagate)",
    )  # fmt: skip
    args = options.parse_args()
    cap = parse_size(args.cap)
    config = LlamaConfig(
        vocab_size=128, hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 256, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    place = Path(tempfile.mkdtemp(prefix="lrsd-out-of-core-", dir=args.directory))
    group = ControlGroup(cap)
    try:
        (place / "model").mkdir()
        total = write_checkpoint(place / "model", config)
        print(
            f"checkpoint {total / 1e9:.2f} GB, {total / cap:.2f} x the cap of {cap / 1e9:.2f} GB", flush=True
        )
        text = place / "text.txt"
        text.write_text("To be, or not to be, that is the question. " * 200)
        size = ["--samples", "8", "--seqlen", "64", "--batch", "4", "--shard-size", "200MB"]
        command = [
            sys.executable, "-m", "lrsd_cli.main", "compress", str(place / "model"), "--ratio", "4x",
            "--calib", str(text), *size, "-o", str(place / "out"), "--json", *args.more,
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=group.enter, check=True)
        memory = json.loads(done.stdout)["memory"]
        subprocess.run([sys.executable, "-m", "lrsd_cli.main", "verify", str(place / "out")], check=True)
        peak, predicted = memory["peak"], memory["predicted"]
        print(
            f"compressed 4x under the cap: peak {peak / 1e9:.3f} GB, predicted {predicted / 1e9:.3f} GB, "
            f"{predicted / peak:.3f} of the peak"
        )
    finally:
        group.remove()
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
