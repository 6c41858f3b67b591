"""The parts of scripts/gpu_check.sh that are no commands of lrsd: what machine this is, texts, how long a
model takes to load, and the report.

Example:
  python scripts/gpu_report.py machine --device cuda
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from lrsd.checkpoint.manifest import Manifest, read_manifest
from lrsd.errors import TRY_AGAIN, InputError
from lrsd.model.load import load_model, resolve_device
from lrsd.model.samples import run_model

_REPEATS = 3
# How far a GPU's result may be from the CPU's, since it adds up in another order: bytes of the linear weights
# and perplexity, relative; KL, relative and in nats, for a KL near 0 is all noise.
_BYTES, _PERPLEXITY, _KL, _NATS = 0.01, 0.02, 0.1, 0.002


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = options.add_subparsers(dest="command", required=True)
    machine_options = commands.add_parser(
        "machine", help="what this machine is, as JSON; exit code 75 without a GPU"
    )
    machine_options.add_argument("--device", default="cuda")
    texts_options = commands.add_parser("texts", help="write calibration.txt and evaluation.txt")
    texts_options.add_argument("directory", type=Path)
    load_options = commands.add_parser(
        "load", help="seconds until a model has given its first logits, as JSON"
    )
    load_options.add_argument("model")
    load_options.add_argument("--device", default="cuda")
    write_options = commands.add_parser("write", help="write the report; exit code 1 if results differ")
    write_options.add_argument("directory", type=Path)
    write_options.add_argument("--tests", type=int, default=0, help="exit code of the tests")
    write_options.add_argument("--report", type=Path, required=True)
    args = options.parse_args()
    if args.command == "machine":
        print(json.dumps(machine(args.device)))
    elif args.command == "texts":
        write_texts(args.directory)
    elif args.command == "load":
        print(json.dumps(loading(args.model, args.device)))
    else:
        text, sound = report(args.directory, args.tests)
        args.report.write_text(text, encoding="utf-8")
        print(f"{'all is well' if sound else 'NOT as it should be'}: {args.report}")
        sys.exit(not sound)


def machine(name: str) -> dict[str, str]:
    """Ends the program with exit code 75 where that device is not there."""
    try:
        device = resolve_device(name)
    except InputError as error:
        print(f"gpu_check: no GPU here that torch can use: {error}", file=sys.stderr)
        sys.exit(TRY_AGAIN)
    found = {"device": str(device), "host": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {
            "card": f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {about.major}.{about.minor}",
            "driver": _driver(), "CUDA of torch": str(torch.version.cuda),
        }  # fmt: skip
    return found | {name: version(name) for name in ("torch", "transformers", "lrsd")}


def _driver() -> str:
    if (tool := shutil.which("nvidia-smi")) is None:
        return "unknown: there is no nvidia-smi"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return said[0] if said else "unknown"


def write_texts(directory: Path) -> None:
    """Halves of what every Python installation has to read."""
    text = "\n\n".join(topics.values())
    (directory / "calibration.txt").write_text(text[: len(text) // 2], encoding="utf-8")
    (directory / "evaluation.txt").write_text(text[len(text) // 2 :], encoding="utf-8")


@torch.inference_mode()
def loading(source: str, device: str) -> dict[str, float]:
    """Best of a few; bytes on the device after it."""
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        loaded = load_model(source, device=device)
        logits = run_model(loaded.model, loaded.kind.example(loaded.model)).logits
        float(logits.sum())  # waits for it
        seconds.append(time.perf_counter() - start)
    on_device = loaded.model.device
    held = torch.cuda.memory_allocated(on_device) if on_device.type == "cuda" else 0
    return {"seconds": min(seconds), "bytes": held}


def report(directory: Path, tests: int) -> tuple[str, bool]:
    """The text, and whether all is as it should be."""
    manifests = {name: read_manifest(directory / name) for name in ("device", "again", "cpu")}
    measured = {name: _json(directory / f"{name}.eval.json") for name in ("dense", "device", "cpu")}
    loads = {name: _json(directory / f"{name}.load.json") for name in measured}
    log = (directory / "tests.txt").read_text(encoding="utf-8").strip().splitlines()
    checks = _checks(manifests, measured)
    checks[f"device tests: {log[-1] if log else 'no output'}"] = tests == 0
    lines = ["# GPU check", ""]
    lines += [f"- {'ok' if good else '**NOT OK**'}: {what}" for what, good in checks.items()]
    lines += ["", "## Machine", ""]
    lines += [f"- {what}: {value}" for what, value in _json(directory / "machine.json").items()]
    lines += ["", "## Compression", "", *_table(("", "device", "again", "cpu"), _compression(manifests))]
    lines += ["", "## Result, measured on the device", ""]
    lines += _table(("", "dense", "device", "cpu"), _quality(manifests, measured, loads))
    if tests:
        lines += ["", "## Tests", "", "```", *log[-60:], "```"]
    return "\n".join([*lines, ""]), all(checks.values())


def _checks(manifests: dict[str, Manifest], measured: dict[str, Any]) -> dict[str, bool]:
    here, there = manifests["device"], manifests["cpu"]
    perplexities = [measured[name]["perplexity"][0]["perplexity"] for name in ("device", "cpu")]
    kl, other_kl = (measured[name]["divergence"][0]["kl"] for name in ("device", "cpu"))
    return {
        "two runs on the device give the same bytes": here.files == manifests["again"].files,
        "the budget holds": here.linear_bytes <= here.budget_bytes,
        f"bytes are the CPU's within {_BYTES:.0%}": abs(here.linear_bytes / there.linear_bytes - 1) <= _BYTES,
        f"perplexity is the CPU's within {_PERPLEXITY:.0%}": abs(perplexities[0] / perplexities[1] - 1)
        <= _PERPLEXITY,
        f"KL is no more than {_KL:.0%} and {_NATS} nats above the CPU's": kl <= (1 + _KL) * other_kl + _NATS,
    }


def _compression(manifests: dict[str, Manifest]) -> list[list[str]]:
    def row(what: str, of: Callable[[Manifest], Any]) -> list[str]:
        return [what, *(str(of(manifest)) for manifest in manifests.values())]

    phases = dict.fromkeys(phase for manifest in manifests.values() for phase in manifest.seconds)
    return [
        row("runs on", lambda m: m.environment["device"]),
        *(row(f"{phase}, s", lambda m, p=phase: f"{m.seconds.get(p, 0):.1f}") for phase in phases),  # type: ignore[misc]
        row("all, s", lambda m: f"{sum(m.seconds.values()):.1f}"),
        row("host's memory, MB", lambda m: f"{m.memory['peak'] / 1e6:,.0f}"),
        row("device's memory, MB", lambda m: f"{m.memory.get('device_peak', 0) / 1e6:,.0f}"),
        row("linear weights, bytes", lambda m: f"{m.linear_bytes:,}"),
        row("ratio", lambda m: f"{m.ratio:.4f}x"),
        row(
            "mean error of a layer",
            lambda m: f"{sum(x.error for x in m.layers.values()) / len(m.layers):.3e}",
        ),
    ]


def _quality(
    manifests: dict[str, Manifest], measured: dict[str, Any], loads: dict[str, Any]
) -> list[list[str]]:
    def row(what: str, of: Callable[[str], str]) -> list[str]:
        return [what, *(of(name) for name in measured)]

    def divergence(key: str, shown: str) -> list[str]:
        found = {n: m["divergence"][0][key] if m["divergence"] else None for n, m in measured.items()}
        return row(shown, lambda n: "" if found[n] is None else f"{found[n]:.4f}")

    return [
        row("perplexity", lambda n: f"{measured[n]['perplexity'][0]['perplexity']:.3f}"),
        divergence("kl", "KL from dense, nats"),
        divergence("top1_agreement", "same top token"),
        row("until the first logits, s", lambda n: f"{loads[n]['seconds']:.2f}"),
        row("device's memory once loaded, MB", lambda n: f"{loads[n]['bytes'] / 1e6:,.0f}"),
        row("decoding, tokens/s", lambda n: f"{measured[n]['speed']['decode']:.1f}"),
        row("prefill, tokens/s", lambda n: f"{measured[n]['speed']['prefill']:.0f}"),
    ]


def _table(head: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (list(head), ["---"] * len(head), *rows)]


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
