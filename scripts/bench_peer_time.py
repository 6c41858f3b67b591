"""Time of `lrsd compress --ratio 4x` beside llm-compressor's GPTQ W4A16: same dense directory, same tokens.

One after the other, model loading and writing included, imports not.
llm-compressor needs an environment of its own:
  python3 -m venv peer
  peer/bin/pip install torch==2.13.0
  peer/bin/pip install 'llmcompressor==0.14.*' torch==2.13.0
Example:
  python scripts/bench_peer_time.py --calib wiki.valid.raw --eval wiki.test.raw --peer-python peer/bin/python
"""

import json
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from bench import Bench, Log, parser
from safetensors.torch import save_file

from lrsd.compress import compress
from lrsd.data.tokens import calibration_samples
from lrsd.model.load import fingerprint
from lrsd.progress import Progress
from lrsd.recipe import Recipe


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--peer-python", required=True, help="python of llm-compressor's environment")
    options.add_argument("--ratio", type=float, default=4.0)
    args = options.parse_args()
    bench = Bench(args)
    dense = bench.dense
    with torch.inference_mode(), tempfile.TemporaryDirectory(prefix="lrsd-bench-") as place:
        model, tokens = Path(place, "dense"), Path(place, "tokens.safetensors")
        dense.model.save_pretrained(model)
        dense.require_tokenizer().save_pretrained(model)
        identity = fingerprint(dense)
        drawn = calibration_samples(dense, identity, bench.calibration, Progress())
        save_file({"tokens": drawn.inputs["input_ids"]}, tokens)
        threads = str(torch.get_num_threads())
        peer_script = str(Path(__file__).with_name("peer_llm_compressor.py"))
        peer = run([args.peer_python, peer_script, model, tokens, Path(place, "peer"), "--threads", threads])
        start = time.perf_counter()
        settings = Recipe.of(ratio=args.ratio)
        manifest = compress(
            str(model), Path(place, "ours"), replace(settings, calibration=bench.calibration), Log()
        )
        seconds = time.perf_counter() - start
    print(f"llm-compressor GPTQ W4A16: {peer['seconds']:.1f} s")
    print(f"lrsd {args.ratio:g}x: {seconds:.1f} s = {seconds / peer['seconds']:.2f} x  {manifest.seconds}")


def run(command: list[object]) -> dict:
    done = subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout[done.stdout.index("{") :])


if __name__ == "__main__":
    main()
