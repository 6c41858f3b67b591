"""What each part of the method is worth: the full method with one part changed at a time.

Example:
  python scripts/ablation.py --calib wiki.valid.raw --eval wiki.test.raw
"""

from typing import Any

from bench import Bench, parser

from lrsd.config import CompressionSettings

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "low rank only": {"structure": "none"},
    "columns only beside it": {"structure": "column"},
    "unstructured S, same bytes": {"structure": "unstructured"},
    "no alternation": {"alternations": 1},
    "uniform ratio": {"allocation": "uniform"},
    "one energy threshold": {"allocation": "energy"},
    "no propagation": {"propagate": False},
    "mean correction": {"mean_correction": True},
}


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--ratio", type=float, default=1.25)
    options.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    args = options.parse_args()
    bench = Bench(args)
    bench.run_dense()
    for name in args.variants:
        bench.run(name, CompressionSettings(ratio=args.ratio, **VARIANTS[name]))
    print(bench.table())


if __name__ == "__main__":
    main()
