"""GGUF files of one model at equal size: llama.cpp's quantizer with an imatrix, and `lrsd compress --format
gguf`, measured by llama.cpp's own perplexity tool against the source.

--bin is a directory with llama.cpp's llama-imatrix, llama-quantize and llama-perplexity; the source archive
of llama-cpp-python on PyPI holds what they are built from (vendor/llama.cpp):

  cmake -G Ninja -B build -DLLAMA_CURL=OFF -DLLAMA_BUILD_SERVER=OFF
  cmake --build build --target llama-quantize llama-imatrix llama-perplexity

Both read the same calibration text, so many windows of so many tokens. Results are kept in OUT and not made
again.
Example:
  python scripts/bench_gguf.py model.gguf --bin build/bin --calib wiki.valid.raw --eval wiki.test.raw -o out
"""

import argparse
import json
import re
import subprocess
from pathlib import Path

from tqdm import tqdm

from lrsd.compress import compress
from lrsd.recipe import Recipe

# What llama-perplexity prints, by the name it has here.
_PRINTED = {
    "perplexity": r"Mean PPL\(Q\)\s*:\s*([\d.]+)",
    "kl": r"Mean\s+KLD:\s*([\d.-]+)",
    "top1": r"Same top p:\s*([\d.]+)",
}


def run(*command: str | Path) -> str:
    """stdout and stderr. Raises: SystemExit with the last lines of a command that fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout + done.stderr


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("model", type=Path, help="GGUF file of 16-bit weights")
    options.add_argument("--bin", type=Path, required=True)
    options.add_argument("--calib", type=Path, required=True)
    options.add_argument("--eval", type=Path, required=True)
    options.add_argument("--types", nargs="+", default=["Q4_0", "Q4_K_M", "Q5_K_M", "Q8_0"])
    options.add_argument("--samples", type=int, default=64)
    options.add_argument("--seqlen", type=int, default=512)
    options.add_argument("--windows", type=int, default=12)
    options.add_argument("--window", type=int, default=1024)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("-o", "--out", type=Path, required=True)
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    threads = ("-t", str(args.threads))
    windows = ("-f", args.eval, "-c", str(args.window), "--chunks", str(args.windows), *threads)
    imatrix, base = args.out / "imatrix", args.out / "logits"
    if not imatrix.exists():
        calibrated = ("-f", args.calib, "-c", str(args.seqlen), "--chunks", str(args.samples))
        run(args.bin / "llama-imatrix", "-m", args.model, *calibrated, *threads, "-o", imatrix)
    if not base.exists():
        run(args.bin / "llama-perplexity", "-m", args.model, *windows, "--kl-divergence-base", base)

    def measured(path: Path) -> dict[str, float]:
        found = path.with_suffix(".json")
        if not found.exists():
            compared = ("--kl-divergence-base", base, "--kl-divergence")
            text = run(args.bin / "llama-perplexity", "-m", path, *windows, *compared)
            rows = {name: re.search(pattern, text) for name, pattern in _PRINTED.items()}
            numbers = {name: float(row[1]) for name, row in rows.items() if row}
            found.write_text(json.dumps(numbers | {"bytes": path.stat().st_size}))
        row: dict[str, float] = json.loads(found.read_text())
        return row

    lines = ["| | bytes | perplexity | KL | top-1 |", "|---|---|---|---|---|"]
    for kind in tqdm(args.types):
        theirs, ours = args.out / f"{kind}.gguf", args.out / f"lrsd-{kind}.gguf"
        if not theirs.exists():
            run(
                args.bin / "llama-quantize", "--imatrix", imatrix, args.model, theirs, kind, str(args.threads)
            )
        if not ours.exists():
            recipe = Recipe.of(
                format="gguf", size=f"{theirs.stat().st_size}B", calib=str(args.calib), samples=args.samples,
                seqlen=args.seqlen,
            )  # fmt: skip
            compress(str(args.model), ours, recipe, resume=True)
        for name, path in ((f"llama-quantize {kind}, imatrix", theirs), ("lrsd, same size", ours)):
            row = measured(path)
            numbers = f"{row['perplexity']:.2f} | {row['kl']:.4f} | {row['top1']:.1f} %"
            lines.append(f"| {name} | {row['bytes']:,} | {numbers} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
