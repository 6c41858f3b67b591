"""Time of one whole compression over the time of one dense float32 forward pass on the same tokens.

Both in this process, on this machine, one after the other.

Example:
  python scripts/bench_time.py --calib wiki.valid.raw --eval wiki.test.raw --bits 16
"""

import time

import torch
from bench import Bench, parser

from lrsd.data.tokens import calibration_samples
from lrsd.model.load import fingerprint, load_model
from lrsd.progress import Progress
from lrsd.recipe import Recipe


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--ratio", type=float, default=1.25)
    args = options.parse_args()
    bench = Bench(args)
    dense = load_model(bench.model, dtype="float32")
    drawn = calibration_samples(bench.dense, fingerprint(bench.dense), bench.calibration, Progress())
    tokens = drawn.inputs["input_ids"]
    with torch.inference_mode():
        dense.model(tokens[:1], use_cache=False)
        start = time.perf_counter()
        for batch in tokens.split(8):
            dense.model(batch, use_cache=False)
        forward = time.perf_counter() - start
    del dense
    row = bench.run(f"lrsd {args.ratio:g}x", Recipe.of(ratio=args.ratio, bits=args.bits))
    print(f"one dense float32 forward pass over {tokens.numel():,} tokens: {forward:.1f} s")
    print(
        f"the whole compression: {row['seconds']:.1f} s = {row['seconds'] / forward:.2f} x  {row['phases']}"
    )


if __name__ == "__main__":
    main()
