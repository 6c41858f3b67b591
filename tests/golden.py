"""Golden bytes: digests of what recipes once gave, per environment, in golden.json.

lrsd is deterministic, so a change that is only to move code leaves every digest as it is. After a change that
is to alter results `pytest tests --record-golden` writes them anew, and perplexities before and after go into
CHANGELOG.md. Sums in another order give other bytes, so digests hold for the processor and torch release that
they were recorded with; elsewhere the comparison is skipped.
"""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

_FILE = Path(__file__).with_name("golden.json")


def digest(directory: Path) -> str:
    """SHA-256 of all tensors of a directory that hold anything, whatever shards they are in."""
    found: dict[str, str] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = file.get_tensor(name)
                if tensor.numel():
                    content = tensor.contiguous().flatten().view(torch.uint8).numpy().data
                    about = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
                    found[about] = hashlib.sha256(content).hexdigest()
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def check_golden(name: str, base: str, directory: Path, *, record: bool) -> None:
    """Compare a result with the digest of that name, or write it there. base: tells one source from others.

    Skips where no digest was recorded for this source in this environment.
    """
    known: dict[str, dict[str, str]] = json.loads(_FILE.read_text()) if _FILE.exists() else {}
    where, found = f"{_environment()}, {base}", digest(directory)
    if record:
        known.setdefault(where, {})[name] = found
        _FILE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        return
    if name not in known.get(where, {}):
        pytest.skip(f"no digest was recorded for {name} of {where}")
    assert found == known[where][name], f"{name}: other bytes than recorded; see tests/golden.py"


def _environment() -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {cpu[1] if cpu else '?'}"
