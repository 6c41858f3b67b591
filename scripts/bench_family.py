"""The default beside every corner of its family at the same bytes: one table, one plot.

Corners: whitened SVD (SVD-LLM), column pruning, GPTQ, GPTQ with 16-bit outlier columns, and the source
paper's method with 8-bit values. The last is a bound in its favour: SSD at half the ratio, its bytes counted
half and its values taken as exact; at 2x and below that is the dense model in 8 bit, which is not run.
GPTQ may mix widths from layer to layer where one width does not fill the bytes; with its scales it does
not go below 2.3 bits. Example:
  python scripts/bench_family.py --calib wiki.valid.raw --eval wiki.test.raw --plot family.png
"""

from statistics import mean

from bench import Bench, parser, skipping

from lrsd.recipe import Recipe


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--ratios", type=float, nargs="+", default=[1.5, 2, 3, 4, 16 / 3, 8])
    options.add_argument("--plot", metavar="PNG")
    args = options.parse_args()
    bench = Bench(args)
    for seed in bench.seeds:
        shared = bench.share_observation(seed)
        for ratio in args.ratios:
            corners = {
                "lrsd": Recipe.of(ratio=ratio),
                "GPTQ": Recipe.of(ratio=ratio, method="gptq"),
                "GPTQ + outlier columns": Recipe.of(ratio=ratio, method="gptq", structure="column"),
                "SVD-LLM": Recipe.of(ratio=ratio, method="svd-llm"),
                "column pruning": Recipe.of(ratio=ratio, method="columns"),
            }
            for name, settings in corners.items():
                with skipping(f"{ratio:.4g}x {name}"):
                    shared.run(f"{ratio:.4g}x {name}", settings)
            if ratio > 2:
                ssd = Recipe.of(ratio=ratio / 2, method="ssd")
                shared.run(f"{ratio:.4g}x SSD, 8 bit (bound)", ssd, counted=0.5)
    bench.report(bench.table())
    if args.plot:
        plot(bench, args.plot)


def plot(bench: Bench, path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    curves: dict[str, set[tuple[float, float]]] = {}
    for row in bench.rows:
        if "ratio" in row:
            name = row["name"].partition(" ")[2]
            point = (16 / row["ratio"], mean(bench.values(row["name"], "perplexity")))
            curves.setdefault(name, set()).add(point)
    for name, points in curves.items():
        bits, scores = zip(*sorted(points), strict=True)
        axes.plot(bits, scores, "o-", label=name)
    axes.axhline(bench.rows[0]["perplexity"], color="gray", linestyle=":", label="dense")
    axes.set(yscale="log", xlabel="bits per weight, all included", ylabel="perplexity")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
