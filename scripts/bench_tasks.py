"""Multiple-choice accuracy of several models on the same items, and by how much it differs from the first's.

What a model answered is kept in --out, and taken from there the next time.

Example (the table in MEASUREMENTS.md):
  python scripts/make_choices.py wiki.test.raw -o items.jsonl --items 400
  python scripts/bench_tasks.py model.gguf smol-4x smol-8x --tasks items.jsonl --out runs/tasks
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lrsd.model.load import load_model
from lrsd.runtimes.lm_eval import mean_interval, open_tasks, run_tasks, task_scores
from lrsd.work.files import write_json


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("models", nargs="+", help="the first is the one to compare with")
    options.add_argument("--tasks", required=True, help="one task of multiple choice, as of lrsd eval")
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--dtype", default="auto")
    options.add_argument("--out", type=Path, default=Path("runs/tasks"))
    args = options.parse_args()
    print(table({model: answers(model, args) for model in args.models}))


def answers(source: str, args: argparse.Namespace) -> dict[str, Any]:
    """A model's scores, and its log-likelihood of every choice of every item."""
    kept = args.out / f"{Path(source).name}.{args.dtype}.{Path(args.tasks).name}.json"
    if not kept.is_file():
        loaded = load_model(source, dtype=args.dtype)
        results = run_tasks(loaded, open_tasks([args.tasks]), batch=args.batch)
        (samples,) = results["samples"].values()
        args.out.mkdir(parents=True, exist_ok=True)
        found = [[value for value, _ in sample["filtered_resps"]] for sample in samples]
        write_json(kept, {"scores": [asdict(score) for score in task_scores(results)], "likelihoods": found})
    return json.loads(kept.read_text())


def table(found: dict[str, dict[str, Any]]) -> str:
    """A row per model and metric. Intervals at 95 %; that of a difference draws the same items of both."""
    base = next(iter(found.values()))
    titles = ("", "metric", "score", "interval", "difference", "interval", "same choice", "log-likelihoods")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for model, answered in found.items():
        pairs = list(zip(answered["likelihoods"], base["likelihoods"], strict=True))
        same = np.mean([np.argmax(one) == np.argmax(other) for one, other in pairs])
        apart = np.concatenate([np.abs(np.subtract(one, other)) for one, other in pairs])
        for score, before in zip(answered["scores"], base["scores"], strict=True):
            change = np.subtract(score["per_item"], before["per_item"])
            low, high = mean_interval(change)
            cells = [
                Path(model).name, score["metric"], f"{score['score']:.2%}",
                f"{score['low']:.2%} to {score['high']:.2%}", f"{change.mean():+.2%}",
                f"{low:+.2%} to {high:+.2%}", f"{same:.1%}",
                f"{apart.mean():.3g} apart, at most {apart.max():.3g}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
