"""What a library call may not touch, and what the command does to its own process."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from recipes import on
from transformers import AutoModelForCausalLM, LlamaConfig, modeling_gguf_pytorch_utils
from transformers.utils import logging as transformers_logging

from lrsd.compress import compress, dry_run
from lrsd.model.load import gguf_parsed_once, load_model, without_bars
from lrsd.progress import Progress
from lrsd.recipe import Recipe
from lrsd.settings import Calibration
from lrsd.work import process
from lrsd.work.process import OwnProcess, Process, own_process
from lrsd.work.residency import Residence

# llama.cpp's names of a block's tensors.
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@pytest.fixture(scope="module")
def gguf_file(
    tiny_llama: Callable[..., LlamaConfig], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A random float32 Llama with the tests' tokenizer, as llama.cpp's converter would write it."""
    config = tiny_llama()
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__))
    writer.add_token_types([1] * config.vocab_size)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items():
        module = name.removesuffix(".weight")
        known = OUTSIDE.get(module)
        if known is None:
            _, _, block, inner = module.split(".", 3)
            known = f"blk.{block}.{NAMES[inner]}"
        writer.add_tensor(f"{known}.weight", tensor.float().numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def surroundings() -> tuple[Any, ...]:
    return (
        gguf.GGUFReader, modeling_gguf_pytorch_utils.tqdm, transformers_logging._tqdm_hook,
        transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity(),
    )  # fmt: skip


def test_a_library_call_leaves_its_surroundings_as_they_were(
    gguf_file: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, libc, used = surroundings(), process._libc(), []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            used.append(name)
            return getattr(libc, name)

    class Watch(Progress):
        def step(self, what: str) -> None:
            assert surroundings() == before

    monkeypatch.setattr(process, "_libc", Watched)
    calibration = Calibration(calib=str(text_file), samples=4, seqlen=32)
    compress(str(gguf_file), tmp_path / "out", on(Recipe.of(ratio=4), calibration), Watch())
    assert surroundings() == before
    assert "mallopt" not in used
    OwnProcess().release_at_once(2**23)
    assert "mallopt" in used or sys.platform != "linux"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux pages weights")
def test_no_hooks_stay_on_a_paged_model(tiny_model_dir: Path, text_file: Path) -> None:
    calibration = Calibration(calib=str(text_file), samples=4, seqlen=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lrsd.work.residency._RESIDENT", 0.0)
        prepared = dry_run(str(tiny_model_dir), on(Recipe.of(ratio=4), calibration))
    assert prepared.source.residence.paged
    for module in prepared.source.loaded.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("paged", [False, True])
def test_the_allocator_is_told_what_paging_needs(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, paged: bool
) -> None:
    told: list[int] = []

    class Told(Process):
        def release_at_once(self, large: int) -> None:
            told.append(large)

    monkeypatch.setattr("lrsd.work.residency._RESIDENT", 0.0 if paged else 1.0)
    residence = Residence(load_model(str(tiny_model_dir)).model, 2**40, Told())
    assert (residence.paged, told) == (paged, [2**20 if paged else 2**23])


def test_an_own_process_parses_a_header_once_and_puts_everything_back(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[Any] = []

    class Counted(GGUFReader):
        def __init__(self, path: Any) -> None:
            parsed.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    before = surroundings()
    load_model(str(gguf_file))
    alone = len(parsed)
    with own_process(gguf_parsed_once(), without_bars()) as own:
        assert isinstance(own, OwnProcess)
        assert surroundings() != before
        for times in (1, 2):
            load_model(str(gguf_file))
            assert len(parsed) == alone + times, "each model once: nothing is kept in between"
    assert alone > 1
    assert surroundings() == before


@pytest.mark.slow
def test_logs_of_a_command_are_whole_lines(gguf_file: Path, text_file: Path) -> None:
    """No carriage returns of progress bars where stderr is a pipe."""
    command = ["compress", str(gguf_file), "--ratio", "4x", "--calib", str(text_file), "--dry-run"]
    program = [sys.executable, "-m", "lrsd_cli.main", *command, "--samples", "4", "--seqlen", "32"]
    done = subprocess.run(program, capture_output=True, check=True)
    assert done.stderr.endswith(b"\n")
    assert not {*range(32)} - {10} & {*done.stderr}
    assert b"observe" in done.stderr
