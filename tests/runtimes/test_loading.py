"""Checkpoints load as whatever transformers loads models as, in programs that know nothing of lrsd."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig

from lrsd.compress import compress
from lrsd.errors import CheckpointError
from lrsd.forms.packed import PackedLinear
from lrsd.intake.json import read_json
from lrsd.recipe import Recipe
from lrsd.runtimes.transformers import names_in
from lrsd.work.files import write_json

TOKENS = torch.arange(3, 40)[None]
LRSD_RUN = (sys.executable, "-c", "from lrsd_cli.main import main; main()", "run")
PROGRAM = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__, sys.argv[2:])
raise SystemExit(3)
"""


@pytest.fixture(scope="module")
def small(tiny_model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embedding and head in 8 bit, too."""
    out = tmp_path_factory.mktemp("small") / "out"
    recipe = Recipe.of(ratio=1.5, scope="checkpoint", calib=str(text_file), samples=8, seqlen=32)
    compress(str(tiny_model_dir), out, recipe)
    return out


def test_a_causal_model_loads_without_its_head(small: Path, tmp_path: Path) -> None:
    """As embedding models are used; and what is saved of that loads again."""
    with torch.inference_mode():
        whole = AutoModelForCausalLM.from_pretrained(small)
        expected = whole.model(TOKENS).last_hidden_state
        bare = AutoModel.from_pretrained(small)
        packed = [name for name, module in bare.named_modules() if isinstance(module, PackedLinear)]
        assert "layers.0.mlp.up_proj" in packed
        assert torch.equal(bare(TOKENS).last_hidden_state, expected)
        bare.save_pretrained(tmp_path / "bare")
        again = AutoModel.from_pretrained(tmp_path / "bare")
        assert torch.equal(again(TOKENS).last_hidden_state, expected)
        dense = AutoModel.from_pretrained(small)
        dense.hf_quantizer.dequantize(dense)
        assert not any(isinstance(module, PackedLinear) for module in dense.modules())


def test_a_bare_model_loads_with_a_new_head(make_model, text_file: Path, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, num_labels=3,
    )  # fmt: skip
    base = make_model(config, AutoModel)
    recipe = Recipe.of(ratio=1.5, calib=str(text_file), samples=8, seqlen=32)
    compress(str(base), tmp_path / "out", recipe)
    with torch.inference_mode():
        bare = AutoModel.from_pretrained(tmp_path / "out")
        headed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        assert headed(TOKENS).logits.shape == (1, 3)
        assert torch.equal(headed.bert(TOKENS).last_hidden_state, bare(TOKENS).last_hidden_state)


def test_a_layer_that_no_model_has_is_an_error_in_the_bare_one_too(small: Path, tmp_path: Path) -> None:
    bare = AutoModel.from_pretrained(small)
    names = names_in(bare, ["model.layers.9.mlp.up_proj", "lm_head", "model.norm"])
    assert names == {"model.layers.9.mlp.up_proj": "model.layers.9.mlp.up_proj", "model.norm": "norm"}
    other = tmp_path / "other"
    other.mkdir()
    for path in small.iterdir():
        (other / path.name).symlink_to(path)
    config = read_json(small / "config.json")
    layers = config["quantization_config"]["layers"]
    layers["model.layers.9.mlp.up_proj"] = layers["model.layers.0.mlp.up_proj"]
    (other / "config.json").unlink()
    write_json(other / "config.json", config)
    with pytest.raises(CheckpointError, match=r"layers\.9\.mlp\.up_proj', which is not a linear layer"):
        AutoModel.from_pretrained(other)


def run_program(program: Path, *before: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, str(program)], capture_output=True, text=True, timeout=300, check=False, cwd=program.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


@pytest.fixture
def program(small: Path, tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.replace("sys.argv[1]", repr(str(small))).replace("[2:]", "[1:]"))
    return path


def test_programs_that_do_not_import_lrsd_load_checkpoints(program: Path) -> None:
    ended = run_program(program, sys.executable)
    assert (ended.returncode, ended.stdout) == (3, "PackedLinear []\n"), ended.stderr


def test_lrsd_run_registers_the_loader(program: Path) -> None:
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    assert "PackedLinear" not in run_program(program, sys.executable, **off).stdout
    ended = run_program(program, *LRSD_RUN, **off)
    assert (ended.returncode, ended.stdout) == (3, "PackedLinear []\n"), ended.stderr
    module = run_program(program, *LRSD_RUN, "-m", **off)
    assert "No module named" in module.stderr


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [("nowhere", None, "no file and no command"), ("binary", b"\x7fELF", "is no Python program")],
)
def test_lrsd_run_says_what_it_cannot_run(
    tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    ended = run_program(tmp_path / name, *LRSD_RUN)
    assert ended.returncode == 2
    assert reason in ended.stderr
    assert "Traceback" not in ended.stderr
