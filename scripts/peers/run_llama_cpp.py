"""Driver of llama.cpp: llama-quantize with an imatrix of the same samples, decoded; see common.py.

settings: "source", a directory with convert_hf_to_gguf.py; "bin", one with llama-imatrix and llama-quantize;
"type". Embedding and head stay as they are. The imatrix's time is part of it, conversion to GGUF is not.
"""

import os
import subprocess
import sys
from pathlib import Path

from common import Clock, finish, linear_names, load_dense, load_tokens, read_job


def main() -> None:
    job = read_job()
    settings = job.settings
    dense, text, imatrix = (job.out / name for name in ("dense.gguf", "calibration.txt", "imatrix.gguf"))
    quantized = job.out / "quantized.gguf"
    tokens = load_tokens(job)
    call(
        sys.executable,
        Path(settings["source"], "convert_hf_to_gguf.py"),
        job.dense,
        "--outfile",
        dense,
        "--outtype",
        "bf16",
    )
    text.write_text(decoded(job, tokens), encoding="utf-8")
    samples, seqlen = tokens.shape
    tools, threads = Path(settings["bin"]), os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    clock = Clock()
    call(
        tools / "llama-imatrix", "-m", dense, "-f", text, "-c", seqlen, "--chunks", samples, "-t", threads,
        "--no-ppl", "-o", imatrix,
    )  # fmt: skip
    call(
        tools / "llama-quantize", "--imatrix", imatrix, "--token-embedding-type", "bf16",
        "--output-tensor-type", "bf16", dense, quantized, settings["type"], threads,
    )  # fmt: skip
    measured = clock.stop()
    names = linear_names(load_dense(job.dense))
    weights = gguf_weights(job, quantized, names)
    finish(job, measured, weights, gguf_bytes(quantized))


def gguf_bytes(path: Path) -> int:
    """Of the matrices of the blocks in a GGUF file."""
    from gguf import GGUFReader

    blocks = (tensor for tensor in GGUFReader(path).tensors if tensor.name.startswith("blk."))
    return sum(tensor.data.nbytes for tensor in blocks if len(tensor.shape) > 1)


def gguf_weights(job, path, names):
    """By the layers' names in transformers, which undoes llama.cpp's order of rows."""
    import torch
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return [(name, found.get_submodule(name).weight.detach().to(torch.bfloat16)) for name in names]


def decoded(job, tokens) -> str:
    """All samples as one text; llama.cpp finds nearly the same tokens in it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(job.dense).decode(tokens.flatten().tolist())


def call(*command) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{Path(command[0]).name} failed: {(done.stdout + done.stderr).strip()[-2000:]}")


if __name__ == "__main__":
    main()
