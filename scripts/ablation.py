"""What each part of the method is worth: the full method with one part changed at a time.

All variants share one pass over the calibration text, its sensitivities and one byte budget. Examples:
  python scripts/ablation.py --calib wiki.valid.raw --eval wiki.test.raw --ratios 4 5.33333
  python scripts/ablation.py --calib ... --eval ... --ratios 1.25 --bits 16
"""

from bench import Bench, parser

from lrsd.recipe import Recipe

AT_16_BIT = {
    "full": {},
    "low rank only": {"structure": "none"},
    "columns only": {"structure": "column"},
    "rows only": {"structure": "row"},
    "unstructured S, same bytes": {"structure": "unstructured"},
    "no alternation": {"alternations": 1},
    "uniform ratio": {"allocation": "uniform"},
    "one energy threshold": {"allocation": "energy"},
    "no propagation": {"propagate": False},
}
# Without the check of the plan and without propagation, which take most of the time.
PLAIN = {"allocation": "kl", "propagate": False}
WITH_CODES = {
    "default": {},
    "with propagation": {**PLAIN, "propagate": True},
    "no propagation": PLAIN,
    "no propagation, uniform ratio": {**PLAIN, "allocation": "uniform"},
    "no propagation, no low rank": {**PLAIN, "rank": 0},
    "no propagation, rank 8 everywhere": {**PLAIN, "rank": 8},
    "no propagation, rank 8, no alternation": {**PLAIN, "rank": 8, "alternations": 1},
    "no propagation, mean correction": {**PLAIN, "mean_correction": True},
    "no propagation, fixed widths + outlier columns": {**PLAIN, "coding": "fixed"},
    "no propagation, fixed widths": {**PLAIN, "coding": "fixed", "structure": "none"},
}


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--ratios", type=float, nargs="+", default=[4.0, 16 / 3])
    options.add_argument("--only", nargs="+", default=None, metavar="VARIANT")
    args = options.parse_args()
    bench = Bench(args)
    shared = bench.share_observation()
    variants = AT_16_BIT if args.bits == "16" else WITH_CODES
    for ratio in args.ratios:
        for name, changes in variants.items():
            if args.only is None or name in args.only:
                recipe = Recipe.of(**{"ratio": ratio, "bits": args.bits, **changes})
                shared.run(f"{ratio:.4g}x {name}", recipe)
    print(bench.table())


if __name__ == "__main__":
    main()
