"""Tasks of lm-evaluation-harness: its own by name, multiple choice of a local file. The only file that
imports it, and only when a task is asked for: that takes seconds."""

import logging
import math
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from lrsd.data.choices import items_dataset, read_items
from lrsd.data.rows import holds_rows
from lrsd.errors import InputError, LrsdError, NumericsError
from lrsd.model.arithmetic import fast_products
from lrsd.model.load import LoadedModel, errors_only

# Those that lm-eval starts with; some tasks put their choices into an order of these.
_RANDOM_SEED, _OTHER_SEED = 0, 1234
# lm-eval's own draws for what is no mean. It takes 100,000, for which it starts a pool of processes.
_LM_EVAL_DRAWS = 1000
# Draws for an interval whose ends are right to a tenth of its width; drawn a few at a time, for memory.
_DRAWS, _DRAWS_AT_ONCE = 9999, 100
_LEVEL = 0.95
# Standard errors on both sides of a score that hold so much.
_NORMAL = 1.96
_YAML = (".yaml", ".yml")
_METRICS = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One metric of a task, or of a group of tasks.

    low, high: of a 95 % interval: by the percentile bootstrap over the items where the score is their mean,
    else 1.96 standard errors away, as lm-eval estimates them; None where it does not. per_item: what the
    score is the mean of, to compare two models by; empty of any other score.
    """

    task: str
    metric: str
    score: float
    low: float | None
    high: float | None
    items: int
    shots: int
    per_item: tuple[float, ...]


def open_tasks(words: Sequence[str], *, trusted: bool = False) -> dict[str, Any]:
    """Tasks with their data, as lm-eval's `evaluate` takes them.

    Args: words: names of lm-eval's tasks, groups and tags, several with commas between them; files of
        multiple-choice items; lm-eval's YAML files. trusted: whether code in the latter may run.
    Raises: InputError for an unknown name, a file that cannot be read, data out of reach, or lm-eval missing.
    """
    specs = [_spec(name, trusted) for name in _names(words)]
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError("--tasks needs lm-evaluation-harness: pip install 'lrsd[tasks]'") from error
    with _as_lm_eval_expects():
        manager = TaskManager(include_defaults=any(isinstance(spec, str) for spec in specs))
        for spec in specs:
            if isinstance(spec, str) and Path(spec).suffix not in _YAML:
                _require_known(spec, manager.all_tasks)
        with _one_line("--tasks: lm-eval cannot open", words, "; a JSONL file of items needs no network"):
            return manager.load(specs)


def run_tasks(
    loaded: LoadedModel, tasks: dict[str, Any], *, limit: int | None = None, batch: int = 8
) -> dict[str, Any]:
    """What lm-eval's `evaluate` returns: results, and by task the samples with their log-likelihoods.

    Args: limit: of the items of each task; batch: requests at once, whose logits are in memory whole.
    Raises: InputError for tasks that this model cannot be given, NumericsError for non-finite likelihoods.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    model = loaded.model
    if not loaded.kind.answers_tasks:
        raise InputError(f"--tasks: lm-eval gives no tasks to a {loaded.kind.name}")
    with (
        _as_lm_eval_expects(),
        fast_products(model.dtype, model.device),
        _one_line("--tasks: lm-eval cannot run", list(tasks["tasks"])),
    ):
        for task in tasks["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_OTHER_SEED)
        # A copy, as it is given a padding token.
        answering = HFLM(pretrained=model, tokenizer=deepcopy(loaded.require_tokenizer()), batch_size=batch)
        results = evaluate(answering, tasks, limit=limit, bootstrap_iters=_LM_EVAL_DRAWS)
    assert results is not None, "that is what processes beyond the first get"
    for name, samples in results["samples"].items():
        _require_finite(name, samples)
    return dict(results)


def task_scores(results: Mapping[str, Any]) -> tuple[TaskScore, ...]:
    """Every metric of what `run_tasks` returned, with its interval."""
    found = {**results["results"], **results.get("groups", {})}
    return tuple(
        _score(results, task, metric, *rule)
        for task, scores in found.items()
        for metric, *rule in (key.split(",") for key in scores)
        if rule and not metric.endswith("_stderr") and isinstance(scores[f"{metric},{rule[0]}"], int | float)
    )


def _score(results: Mapping[str, Any], task: str, metric: str, rule: str) -> TaskScore:
    """rule: what lm-eval calls a filter: how answers are taken from what the model writes."""
    found = results["results"].get(task) or results["groups"][task]
    score, stderr = float(found[f"{metric},{rule}"]), found.get(f"{metric}_stderr,{rule}")
    samples = [sample for sample in results["samples"].get(task, []) if sample["filter"] == rule]
    values = [float(v) for sample in samples if isinstance(v := sample.get(metric), int | float)]
    is_mean = len(values) == len(samples) > 0 and math.isclose(fmean(values), score, abs_tol=1e-9)
    low, high = mean_interval(values) if is_mean else _normal_interval(score, stderr)
    counted = results["n-samples"].get(task, {}).get("effective")
    return TaskScore(
        task=task,
        metric=metric if rule == "none" else f"{metric} ({rule})",
        score=score,
        low=low,
        high=high,
        items=counted or found.get("sample_len") or 0,
        shots=results["n-shot"].get(task) or 0,
        per_item=tuple(values) if is_mean else (),
    )


def mean_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Ends of the 95 % percentile bootstrap interval of a mean; None of fewer than two values."""
    from scipy.stats import bootstrap

    if len(values) < 2:
        return None, None
    found = bootstrap(
        (np.asarray(values),), np.mean, n_resamples=_DRAWS, batch=_DRAWS_AT_ONCE, vectorized=True,
        confidence_level=_LEVEL, method="percentile", rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _normal_interval(score: float, stderr: Any) -> tuple[float | None, float | None]:
    if not isinstance(stderr, int | float) or not math.isfinite(stderr):
        return None, None
    return score - _NORMAL * float(stderr), score + _NORMAL * float(stderr)


def _names(words: Sequence[str]) -> list[str]:
    """Names and files apart, none twice; a file that is there may have commas in its name."""
    parts = [[word] if _is_file(word) and Path(word).is_file() else word.split(",") for word in words]
    names = dict.fromkeys(name.strip() for some in parts for name in some if name.strip())
    if not names:
        raise InputError("--tasks: expected the name of a task, or a file of items, got nothing")
    return list(names)


def _is_file(name: str) -> bool:
    return holds_rows(Path(name)) or Path(name).suffix in _YAML


def _spec(name: str, trusted: bool) -> str | dict[str, Any]:
    """What lm-eval calls a task: a name of its own, the path of a YAML file, or the configuration of one."""
    path = Path(name)
    if not _is_file(name):
        return name
    if path.suffix not in _YAML:
        return _multiple_choice(name)
    if not path.is_file():
        raise InputError(f"--tasks: no file {name!r}")
    if not trusted:
        raise InputError(
            f"--tasks: {name} is a task of lm-eval's, whose functions, templates and data may run any code; "
            "read it, and add --trust-tasks, or give the items themselves as JSONL"
        )
    return name


def _multiple_choice(name: str) -> dict[str, Any]:
    items = read_items(name)
    table = items_dataset(items)
    spaced = all(choice[0].isspace() for item in items for choice in item.choices)
    return {
        "task": name,
        "custom_dataset": lambda **about: {"test": table},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "" if spaced else " ",
        "metric_list": _METRICS,
    }


def _require_known(name: str, known: Sequence[str]) -> None:
    if name in known:
        return
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    raise InputError(
        f"--tasks: lm-eval has no task {name!r}. "
        + (f"Did you mean {', '.join(close)}? " if close else "")
        + f"Available: {len(known):,} (`lm-eval ls tasks` lists them), or a JSONL file of items"
    )


def _require_finite(task: str, samples: Sequence[Mapping[str, Any]]) -> None:
    """lm-eval would take the first of the choices where a likelihood is not a number."""
    for sample in samples:
        for response in np.ravel(np.asarray(sample["filtered_resps"], dtype=object)):
            if isinstance(response, float) and not math.isfinite(response):
                raise NumericsError(
                    f"the model gives non-finite likelihoods in item {sample['doc_id'] + 1} of {task}"
                )


@contextmanager
def _one_line(what: str, names: Sequence[str], more: str = "") -> Iterator[None]:
    """Whatever lm-eval, and the libraries that it reads data with, raise is one line."""
    try:
        yield
    except (LrsdError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of every kind, and from many libraries
        line = " ".join(str(error).split())[:300]
        raise InputError(f"{what} {', '.join(names)} ({type(error).__name__}: {line}){more}") from error


class _FirstCut(logging.StreamHandler):
    """Of what lm-eval logs, errors, and the first warning of a request that is cut to the model's context."""

    told = False

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            return True
        first = "Truncating" in record.getMessage() and not self.told
        self.told = self.told or first
        return first


@contextmanager
def _as_lm_eval_expects() -> Iterator[None]:
    """Its seeds, a quiet log, one process; what it prints, bars too, on stderr if that is a terminal. All as
    before at the end."""
    log, known = logging.getLogger("lm_eval"), os.environ.get("DISABLE_MULTIPROC")
    propagates, state, array_state = log.propagate, random.getstate(), np.random.get_state()
    log.propagate, handler = False, _FirstCut(sys.stderr)
    log.addHandler(handler)
    os.environ["DISABLE_MULTIPROC"] = "1"  # its bootstrap forks a process that has threads
    try:
        shown = sys.stderr if sys.stderr.isatty() else StringIO()
        with (
            errors_only(), redirect_stderr(shown), redirect_stdout(shown),
            torch.random.fork_rng(devices=[]),
        ):  # fmt: skip
            random.seed(_RANDOM_SEED)
            np.random.seed(_OTHER_SEED)  # the generator that tasks draw from
            torch.manual_seed(_OTHER_SEED)
            yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagates
        random.setstate(state)
        np.random.set_state(array_state)
        if known is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = known
