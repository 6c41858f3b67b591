"""What each part of the method is worth: the full method, and with one part taken out or changed at a time.

Every row is a compression of its own at the same bytes. With --fast all rows of a seed share one pass over
the calibration text and, per ratio and coding, the full method's sensitivities: only for parts that change
neither. To add a part, add a line to PARTS.
Examples:
  python scripts/ablation.py --calib wiki.valid.raw --eval wiki.test.raw --ratios 4 5.33333 --seeds 3
  python scripts/ablation.py --calib ... --eval ... --parts no-allocation no-entropy-coding
  python scripts/ablation.py --calib ... --eval ... --ratios 1.25 --bits 16 --fast
"""

from collections.abc import Callable, Iterable
from typing import Any

from bench import Bench, parser, skipping

from lrsd.recipe import Recipe

# What taking a part out, or putting one in, changes in the full method's recipe.
PARTS: dict[str, dict[str, Any]] = {
    "no-row-weights": {"row_weights": False},
    "token-weights": {"token_weights": True},
    "plain-grid": {"grid": "plain"},
    "no-row-weights-plain-grid": {"row_weights": False, "grid": "plain"},
    "no-allocation": {"allocation": "uniform"},
    "no-propagation": {"propagate": False},
    "always-propagation": {"propagate": True},
    "no-low-rank": {"rank": 0},
    "rank-8-everywhere": {"rank": 8},
    "no-alternation": {"alternations": 1},
    "mean-correction": {"mean_correction": True},
    "no-entropy-coding": {"coding": "fixed"},
    "no-entropy-coding-no-columns": {"coding": "fixed", "structure": "none"},
}
# The same for --bits 16.
PARTS_AT_16_BIT: dict[str, dict[str, Any]] = {
    "no-row-weights": {"row_weights": False},
    "token-weights": {"token_weights": True},
    "no-allocation": {"allocation": "uniform"},
    "one-energy-threshold": {"allocation": "energy"},
    "no-propagation": {"propagate": False},
    "no-alternation": {"alternations": 1},
    "low-rank-only": {"structure": "none"},
    "columns-only": {"structure": "column"},
    "rows-only": {"structure": "row"},
    "unstructured": {"structure": "unstructured"},
}


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--ratios", type=float, nargs="+", default=[4.0, 16 / 3])
    options.add_argument("--fast", action="store_true", help="share moments and sensitivities, see above")
    options.add_argument(
        "--parts", nargs="+", metavar="PART",
        help=f"default: all; of {', '.join(PARTS)}; with --bits 16 of {', '.join(PARTS_AT_16_BIT)}",
    )  # fmt: skip
    args = options.parse_args()
    parts = PARTS_AT_16_BIT if args.bits == "16" else PARTS
    if unknown := set(args.parts or []) - set(parts):
        options.error(f"no part {', '.join(sorted(unknown))}; available: {', '.join(parts)}")
    bench = Bench(args)
    # One seed's moments at a time are in memory.
    shared = (bench.share_observation(seed).run for seed in bench.seeds)
    runs: Iterable[Callable[[str, Recipe], Any]] = shared if args.fast else [bench.run]
    for run in runs:
        for ratio in args.ratios:
            for part in ["full", *(args.parts or parts)]:
                changes = {} if part == "full" else parts[part]
                name = f"{ratio:.4g}x {part}"
                with skipping(name):
                    run(name, Recipe.of(**{"ratio": ratio, "bits": args.bits, **changes}))
    bench.report(bench.table())


if __name__ == "__main__":
    main()
