"""scripts/bench_peers.py: nothing is done twice, failures are in the table, bytes and scores are right."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS / "peers")]

import bench_peers  # noqa: E402
from common import linear_names, stored_bytes, unpacked_gptq  # noqa: E402
from evaluate import evaluate  # noqa: E402
from peers.table import group, markdown  # noqa: E402
from peers.tools import TOOLS, Setting, Tool  # noqa: E402
from run_llama_cpp import gguf_bytes  # noqa: E402

ROW = {"tool": "hqq", "setting": "W4", "seed": 0, "level": 4.0, "cpu seconds": 8.0, "peak bytes": 2e9}


@pytest.fixture
def peers(tmp_path: Path, tiny_model_dir: Path, text_file: Path) -> Callable[..., bench_peers.Peers]:
    def make(**changes: Any) -> bench_peers.Peers:
        protocol = {"samples": 2, "seqlen": 16, "windows": 1, "length": 32, "retry": False, **changes}
        args = argparse.Namespace(calib=str(text_file), eval=str(text_file), out=tmp_path, **protocol)
        return bench_peers.Peers(args, tiny_model_dir)

    return make


def test_what_is_done_is_not_done_again(peers: Callable[..., bench_peers.Peers]) -> None:
    done = []

    def measure(name: str, **row: Any) -> Callable[[], dict[str, Any]]:
        return lambda: done.append(name) or {**ROW, "setting": name, **row}

    def all_kept(**changes: Any) -> list[str]:
        bench = peers(**changes)
        bench.keep("good", measure("good", bits=4.0))
        bench.keep("bad", measure("bad", failed="no kernel"))
        bench.keep("ours", measure("ours", code=bench.code))
        assert [row["setting"] for row in bench.rows] == ["good", "bad", "ours"]
        began, done[:] = list(done), []
        return began

    assert all_kept() == ["good", "bad", "ours"]
    assert all_kept() == []
    assert all_kept(retry=True) == ["bad"]
    assert all_kept(seqlen=32) == ["good", "bad", "ours"]
    path = next(peers().folder.glob("ours.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"code": "of yesterday"}))
    assert {row["setting"] for row in peers().known()} == {"good", "bad"}
    assert all_kept() == ["ours"]
    assert {row["setting"] for row in peers().known()} == {"good", "bad", "ours"}


def test_failure_is_a_row_and_leaves_nothing(
    peers: Callable[..., bench_peers.Peers], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import json, sys; from pathlib import Path\n"
        "dense, tokens, out, settings = sys.argv[1:]\n"
        "if json.loads(settings)['bits'] == 3: raise ValueError('3 bits: no kernel\\nfor these')\n"
        "Path(out).mkdir(parents=True)\n"
        "Path(out, 'result.json').write_text(json.dumps({'bytes': 17, 'weights': 32}))\n"
    )
    settings = tuple(Setting(f"W{bits}", bits, {"bits": bits}) for bits in (3, 4))
    monkeypatch.setitem(TOOLS, "fake", Tool(str(driver), settings))  # type: ignore[arg-type]
    bench = peers()
    monkeypatch.setattr(bench, "evaluated", lambda directory: {"perplexity": 9.0, "KL": 0.1, "top-1": 0.9})
    for run in bench_peers.planned(["fake"], [2, 3, 4], range(1)):
        bench.keep(run.name, lambda run=run: bench.measured(run))
    assert [row.get("failed") for row in bench.rows] == ["ValueError: 3 bits: no kernel", None]
    assert bench.rows[1]["bits"] == 4.25
    assert not list((tmp_path / "work").iterdir())
    table = markdown(bench.rows)
    assert "fake W3 did not run: ValueError: 3 bits: no kernel" in table
    assert "| fake W4 | 4.250 | 9.00 | 0.1000 | 90.0% |" in table
    (matched,) = bench_peers.matching(bench.rows, ["fake"])
    assert matched.setting.options == {"bytes": 17}
    assert (matched.tool, matched.setting.name) == ("lrsd", "at fake W4's bytes")


def test_best_of_a_group_is_bold_whoever_it_is() -> None:
    rows = [
        ROW | {"tool": "dense", "setting": "", "bits": 16.0, "perplexity": 20.0, "KL": 0.0, "top-1": 1.0},
        ROW | {"tool": "lrsd", "bits": 4.25, "perplexity": 21.0, "KL": 0.10, "top-1": 0.8},
        ROW | {"tool": "peer", "bits": 4.3, "perplexity": 21.5, "KL": 0.05, "top-1": 0.8},
        *(
            ROW | {"tool": "peer", "setting": "W2", "seed": seed, "bits": 2.2, "perplexity": 90.0 + seed}
            | {"KL": 2, "top-1": 0.3}
            for seed in (0, 2)
        ),
    ]  # fmt: skip
    lines = markdown(rows).splitlines()
    assert "| lrsd W4 | 4.250 | **21.00** | 0.1000 | **80.0%** | 8 | 2,000 |" in lines
    assert "| peer W4 | 4.300 | 21.50 | **0.0500** | **80.0%** | 8 | 2,000 |" in lines
    assert any(line.startswith("| peer W2 | 2.200 | 91.00 ± 1.41 | 2.0000 ± 0.0000 |") for line in lines)
    assert lines.index("| *about 4.25 bits* | | | | | | |") < lines.index("| *about 2 bits* | | | | | | |")
    assert [group(bits) for bits in (4.5, 4.1, 3.6, 2.3, 15)] == [4.25, 4.0, 4.0, 2.0, 16.0]


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("Traceback\n  File x\nValueError: no such type\nINFO: bye\n", "ValueError: no such type"),
        ("ERROR: a and b conflict\nERROR: for help visit a page\nhint\n", "ERROR: a and b conflict"),
        ("main: reading\nllama-quantize failed: no imatrix\n", "llama-quantize failed: no imatrix"),
        ("killed\n\n", "killed"),
        ("", "no message"),
    ],
)
def test_reason_is_the_last_line_that_says_it(output: str, said: str) -> None:
    assert bench_peers.reason(output) == said


def test_scores_of_a_known_model(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    command = (str(text_file), 2, 32, tmp_path / "logits")
    itself = evaluate(str(tiny_model_dir), str(tiny_model_dir), *command)
    assert (itself["KL"], itself["top-1"]) == (0, 1)
    found = evaluate(str(tiny_model_dir), str(tmp_path / "other"), *command)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    ids = torch.tensor(tokenizer(text_file.read_text(), add_special_tokens=False).input_ids[:64]).view(2, 32)
    dense = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    other = other.float()
    with torch.no_grad():
        p, q = (model(ids).logits[:, :-1].flatten(0, 1).log_softmax(-1) for model in (dense, other))
    loss = cross_entropy(q, ids[:, 1:].flatten())
    divergence = kl_div(q, p, log_target=True, reduction="batchmean")
    assert found["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)
    assert found["KL"] == pytest.approx(divergence.item(), rel=1e-3)
    assert found["top-1"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item(), abs=0.02)


def test_bytes_are_those_of_the_files(tmp_path: Path) -> None:
    dense, saved = tmp_path / "dense", tmp_path / "saved"
    for folder in (dense, saved):
        folder.mkdir()
    linear = torch.nn.Linear(8, 4, dtype=torch.bfloat16)
    save_file(
        {f"a.proj.{name}": value.detach() for name, value in linear.named_parameters()},
        dense / "model.safetensors",
    )
    stored = {
        "a.proj.codes.packed": torch.zeros(4, 4, dtype=torch.uint8),
        "a.proj.scale": torch.zeros(4, dtype=torch.half),
        "a.proj.bias": torch.zeros(4, dtype=torch.bfloat16),
        "a.proj2.weight": torch.zeros(99),
        "a.norm": torch.zeros(8),
    }
    parts = list(stored.items())
    save_file(dict(parts[:1]), saved / "1.safetensors")
    save_file(dict(parts[1:]), saved / "2.safetensors", {"format": "pt"})
    assert stored_bytes(saved, ["a.proj"], dense) == 16 + 8  # the model's own bias is not
    assert stored_bytes(dense, ["a.proj"], saved) == 64
    model = SimpleNamespace(
        get_output_embeddings=lambda: linear,
        named_modules=lambda: [("a", torch.nn.Linear(2, 2)), ("b", linear)],
    )
    assert linear_names(model) == ["a"]  # the head is not


def test_bytes_of_a_gguf_file_are_those_of_its_blocks_matrices(tmp_path: Path) -> None:
    writer, kind = GGUFWriter(tmp_path / "x.gguf", "llama"), GGMLQuantizationType.Q4_0
    matrix = np.ones((4, 64), np.float32)
    for name in ("blk.0.attn_q.weight", "blk.1.ffn_up.weight"):
        writer.add_tensor(name, quantize(matrix, kind), raw_dtype=kind)
    writer.add_tensor("blk.0.attn_norm.weight", matrix[0])
    writer.add_tensor("token_embd.weight", matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert gguf_bytes(tmp_path / "x.gguf") == 2 * 4 * 64 * 4.5 / 8


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("ordered", [False, True])
def test_autogptq_format_is_unpacked(bits: int, ordered: bool, generator: torch.Generator) -> None:
    inputs, outputs, size = 64, 32, 32
    codes_IO = torch.randint(2**bits, (inputs, outputs), generator=generator)
    zeros_GO = torch.randint(1, 2**bits, (inputs // size, outputs), generator=generator)
    scales_GO = torch.rand(inputs // size, outputs, generator=generator)
    group_I = torch.arange(inputs) // size
    if ordered:
        group_I = group_I[torch.randperm(inputs, generator=generator)]
    tensors = {
        "qweight": packed(codes_IO.T, bits).T,
        "qzeros": packed(zeros_GO - 1, bits),
        "scales": scales_GO,
    }
    if ordered:
        tensors["g_idx"] = group_I.int()
    expected_OI = ((codes_IO - zeros_GO[group_I]) * scales_GO[group_I]).T
    torch.testing.assert_close(unpacked_gptq(tensors, bits), expected_OI)


def packed(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Each row as one number, the first integer lowest, in words of 32 bits."""
    words = []
    for row in rows.tolist():
        number = sum(value << (bits * place) for place, value in enumerate(row))
        words.append(np.frombuffer(number.to_bytes(bits * len(row) // 8, "little"), np.int32))
    return torch.tensor(np.stack(words))
