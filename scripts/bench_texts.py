"""The worst case over kinds of text: rows are calibrations, columns evaluation texts, see kinds_of_text.py.

Every calibration is one kind of text, self (sampled from the model), or several joined by +, which is their
mixture. Example:
  python scripts/bench_texts.py --prose wiki.valid.raw --seeds 3
  python scripts/bench_texts.py --prose wiki.valid.raw --only self prose self+prose
"""

from pathlib import Path
from statistics import mean

from bench import Bench, column, parser, skipping, spread
from kinds_of_text import KINDS, write_halves

from lrsd.recipe import Recipe

MIXTURE = "+".join(KINDS)


def main() -> None:
    options = parser(__doc__ or "", texts=False)
    options.add_argument("--prose", required=True, type=Path, help="a WikiText file")
    options.add_argument("--ratio", type=float, default=4.0)
    options.add_argument("--method", default="lrsd")
    options.add_argument("--only", nargs="+", default=[*KINDS, "self", MIXTURE], metavar="CALIBRATION")
    args = options.parse_args()
    halves = write_halves(args.prose, args.out / "texts")
    sources = {"self": "self"} | {kind: calib for kind, (calib, _) in halves.items()}
    if unknown := {kind for choice in args.only for kind in choice.split("+")} - set(sources):
        options.error(f"no text {', '.join(sorted(unknown))}; available: {', '.join(sources)}")
    args.calib, args.eval = list(sources.values()), [text for _, text in halves.values()]
    bench = Bench(args)
    bits = {"bits": args.bits} if args.method == "lrsd" else {}
    names = {f"{args.method} {args.ratio:.4g}x, {choice}": choice.split("+") for choice in args.only}
    for name, kinds in names.items():
        recipe = Recipe.of(ratio=args.ratio, method=args.method, **bits)
        with skipping(name):
            bench.run(name, recipe, calib=[sources[kind] for kind in kinds])
    bench.report(table(bench, [name for name in names if bench.values(name, "KL")]))


def table(bench: Bench, names: list[str]) -> str:
    """Relative rise of perplexity over the dense model's / KL, and the worst text of every row by each."""
    # The first text leads: its columns bear no name.
    texts = dict(zip(KINDS, ["", *list(bench.items)[1:]], strict=True))
    dense = {kind: mean(bench.values("dense", column("perplexity", text))) for kind, text in texts.items()}
    lines = [
        f"| calibrated on | {' | '.join(texts)} | worst rise | worst KL |",
        "|---" * (len(texts) + 3) + "|",
        f"| dense perplexity | {' | '.join(f'{score:.2f}' for score in dense.values())} | | |",
    ]
    for name in names:
        rises = {
            kind: [score / dense[kind] - 1 for score in bench.values(name, column("perplexity", text))]
            for kind, text in texts.items()
        }
        distances = {kind: bench.values(name, column("KL", text)) for kind, text in texts.items()}
        cells = [f"{spread(rises[kind], '.1%')} / {spread(distances[kind], '.4f')}" for kind in texts]
        for scores, form in ((rises, ".1%"), (distances, ".4f")):
            worst = max(scores, key=lambda kind: mean(scores[kind]))
            cells.append(f"{spread(scores[worst], form)} ({worst})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
