"""What each part of the method is worth: the full method, and with one part taken out or changed at a time.

Every row is a compression of its own at the same bytes. With --fast all rows of a seed share one pass over
the calibration text and, per ratio and coding, the full method's sensitivities: only for parts that change
neither. To add a part, add a line to PARTS.
Examples:
  python scripts/ablation.py --calib wiki.valid.raw --eval wiki.test.raw --ratios 4 5.33333 --seeds 3
  python scripts/ablation.py --calib ... --eval ... --parts no-allocation no-entropy-coding
  python scripts/ablation.py --calib ... --eval ... --ratios 1.25 --bits 16 --fast
  python scripts/ablation.py --calib ... --eval ... --ratios 1.25 --method ssd --fast
  python scripts/ablation.py --calib ... --eval ... --ratios 4 --method ssd --code-bits 3 --fast
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
    "blocks-only": {"structure": "block"},
    "blocks-of-32-only": {"structure": "block", "block_size": 32},
    "2:4-only": {"structure": "2:4"},
    "unstructured": {"structure": "unstructured"},
    "2:4-too": {"structure": "column,row,2:4"},
    "any-structure": {"structure": "column,row,block,2:4,unstructured"},
}
# The same for --method ssd, in the order of its paper: what its parts add to a low rank.
PARTS_OF_SSD: dict[str, dict[str, Any]] = {
    "low-rank-only": {"structure": "none"},
    "sparse-only": {"energy": 0.0},
    "one-round": {"alternations": 1},
    "whole-channels": {"threshold": False},
    "output-channels": {"structure": "row"},
    "output-channels-one-round": {"structure": "row", "alternations": 1},
}
# The same with codes, triple compression: at 4x these are of 3 bit.
PARTS_OF_CODED_SSD: dict[str, dict[str, Any]] = {
    "codes-only": {"structure": "none", "energy": 0.0},
    "codes-and-low-rank": {"structure": "none"},
    "codes-and-sparse": {"energy": 0.0},
    "one-round": {"alternations": 1},
    "factors-in-8-bit": {"factor_bits": "8"},
    "factors-in-4-bit": {"factor_bits": "4"},
}


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--ratios", type=float, nargs="+", default=[4.0, 16 / 3])
    options.add_argument("--method", choices=["lrsd", "ssd"], default="lrsd")
    options.add_argument("--code-bits", default="16", help="of --method ssd")
    options.add_argument("--fast", action="store_true", help="share moments and sensitivities, see above")
    options.add_argument(
        "--parts", nargs="+", metavar="PART",
        help=f"default: all; of {', '.join(PARTS)}; with --bits 16 of {', '.join(PARTS_AT_16_BIT)}; with "
        f"--method ssd of {', '.join(PARTS_OF_SSD)}; with codes too of {', '.join(PARTS_OF_CODED_SSD)}",
    )  # fmt: skip
    args = options.parse_args()
    if args.method == "ssd":
        parts = PARTS_OF_SSD if args.code_bits == "16" else PARTS_OF_CODED_SSD
    else:
        parts = PARTS_AT_16_BIT if args.bits == "16" else PARTS
    full = {"method": args.method, "bits": args.bits if args.method == "lrsd" else args.code_bits}
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
                name = f"{ratio:.4g}x {part}" if args.method == "lrsd" else f"{ratio:.4g}x ssd {part}"
                with skipping(name):
                    run(name, Recipe.of(**{"ratio": ratio, **full, **changes}))
    bench.report(bench.table())


if __name__ == "__main__":
    main()
