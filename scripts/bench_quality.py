"""Perplexity, KL and top-1 agreement at equal bytes: lrsd and the baselines, on a real model.

Example (the README's table):
  python scripts/bench_quality.py --calib wiki.valid.raw --eval wiki.test.raw --seeds 3
  python scripts/bench_quality.py --calib ... --eval ... --moved --ratios 4 5.33333 8
  python scripts/bench_quality.py --calib ... --eval ... --ratios 1.1 1.25 1.5 2 3 --methods lrsd --bits 16
"""

from bench import Bench, parser, skipping

from lrsd.recipe import Recipe


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--ratios", type=float, nargs="+", default=[4.0])
    options.add_argument("--methods", nargs="+", default=["gptq", "lrsd"])
    args = options.parse_args()
    bench = Bench(args)
    for ratio in args.ratios:
        for method in args.methods:
            bits = {"bits": args.bits} if method == "lrsd" else {}
            name = f"{method} {ratio:.4g}x"
            with skipping(name):
                bench.run(name, Recipe.of(ratio=ratio, method=method, **bits))
    bench.report(bench.table())


if __name__ == "__main__":
    main()
