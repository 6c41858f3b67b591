"""What each part of the method is worth: the full method with one part changed at a time.

All variants share one survey (curves and sensitivities) and one byte budget. Example:
  python scripts/ablation.py --calib wiki.valid.raw --eval wiki.test.raw
"""

from copy import deepcopy
from dataclasses import replace

import torch
from bench import Bench, Log, parser

from lrsd.compress import Clock, Prepared, choose_plan, fit_blocks, prepare
from lrsd.config import CompressionSettings
from lrsd.numerics.allocate import LayerCurve, Support, plan_bytes
from lrsd.survey import unstructured_support


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--ratio", type=float, default=1.25)
    args = options.parse_args()
    bench = Bench(args)
    bench.run_dense()
    full = CompressionSettings(ratio=args.ratio)
    variants = {
        "full": full,
        "low rank only": replace(full, structure="none"),
        "columns only beside it": replace(full, structure="column"),
        "rows only beside it": replace(full, structure="row"),
        "unstructured S, same bytes": replace(full, structure="unstructured"),
        "no alternation": replace(full, alternations=1),
        "uniform ratio": replace(full, allocation="uniform"),
        "one energy threshold": replace(full, allocation="energy"),
        "no propagation": replace(full, propagate=False),
    }
    with torch.inference_mode():
        surveyed = prepare(bench.model, full, bench.calibration, Log(), Clock())
    for name, settings in variants.items():
        print(f"{name} ...", flush=True)
        with torch.inference_mode():
            prepared = variant(surveyed, settings)
            fit_blocks(prepared, settings, Log())
        bench.add(name, prepared.loaded.model, plan_bytes(prepared.plan, prepared.curves), prepared.budget)
    print(bench.table())


def variant(surveyed: Prepared, settings: CompressionSettings) -> Prepared:
    """The same survey on a fresh copy of the model, with the supports that the settings allow."""
    model = deepcopy(surveyed.loaded.model)
    curves = {name: restricted(curve, settings) for name, curve in surveyed.curves.items()}
    survey = replace(surveyed.survey, curves=curves)
    replay = replace(surveyed.replay, model=model)
    plan, candidates, chosen = choose_plan(replay, survey, surveyed.tokens, surveyed.budget, settings, Log())
    return replace(
        surveyed,
        loaded=replace(surveyed.loaded, model=model),
        replay=replay,
        survey=survey,
        plan=plan,
        candidates=candidates,
        chosen=chosen,
    )


def restricted(curve: LayerCurve, settings: CompressionSettings) -> LayerCurve:
    if settings.structure == "unstructured":
        return replace(curve, supports=(unstructured_support(curve.supports[0], curve.shape, settings),))
    allowed = {
        "none": lambda s: not s.columns and not s.rows,
        "column": lambda s: not s.rows,
        "row": lambda s: not s.columns,
        "auto": lambda s: True,
    }[settings.structure]
    kept: tuple[Support, ...] = tuple(filter(allowed, curve.supports))
    return replace(curve, supports=kept)


if __name__ == "__main__":
    main()
