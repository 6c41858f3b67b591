"""A model of a GGUF file turns its positions as fast as llama.cpp does: by the file's factors and scaling."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from gguf_files import add_fields, write_header, write_llama
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lrsd.compress import compress
from lrsd.errors import InputError
from lrsd.model.load import load_model
from lrsd.model.rope import carry_rope
from lrsd.recipe import Recipe

THETA, PAIRS, TEXT = 500_000.0, 8, {"samples": 4, "seqlen": 32}
OTHERS = [1.0, 1.25, 1.5, 2.0, 4.0, 8.0, 8.0, 64.0]
FREQUENCIES = THETA ** (-torch.arange(PAIRS, dtype=torch.float64) / PAIRS)


def llama3(factor: float) -> list[float]:
    """Written out from llama.cpp's convert_hf_to_gguf.py."""
    found = []
    for frequency in FREQUENCIES.tolist():
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192 / 1:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return found


def config_of(
    path: Path, architecture: str = "llama", factors: dict[str, list[float]] | None = None, **scaling: Any
) -> PretrainedConfig:
    """transformers' configuration of a file, with heads of 16 columns, after lrsd's part."""
    fields = {
        "ARCH.context_length": 131072, "ARCH.embedding_length": 64, "ARCH.block_count": 6,
        "ARCH.attention.head_count": 4, "ARCH.rope.freq_base": THETA, "ARCH.attention.key_length": 16,
        **{f"ARCH.rope.{key.replace('__', '.')}": value for key, value in scaling.items()},
    }  # fmt: skip
    if architecture == "llama":
        fields["ARCH.rope.dimension_count"] = 16
    tensors = {f"rope_{name}.weight": values for name, values in (factors or {}).items()}
    write_header(path / "model.gguf", architecture, fields, tensors)
    config = AutoConfig.from_pretrained(path, gguf_file="model.gguf")
    carry_rope(config, path / "model.gguf")
    config.save_pretrained(path)
    return AutoConfig.from_pretrained(path)


def frequencies(config: PretrainedConfig, length: int = 1, **layer: str) -> tuple[Tensor, float]:
    parameters = config.rope_parameters.get("full_attention", config.rope_parameters)
    found, attention = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, None, seq_len=length, **layer)
    return found.double(), attention


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_factors_of_llama3_become_its_formula(tmp_path: Path, factor: float) -> None:
    config = config_of(tmp_path, factors={"freqs": llama3(factor)})
    assert config.rope_parameters == {
        "rope_type": "llama3", "rope_theta": THETA, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    torch.testing.assert_close(frequencies(config)[0] * torch.tensor(llama3(factor)).double(), FREQUENCIES,
                               rtol=1e-5, atol=0)  # fmt: skip


@pytest.mark.parametrize("length", [1, 8192, 131072, 10**6])
def test_other_factors_divide_the_frequencies_of_every_length(tmp_path: Path, length: int) -> None:
    found, attention = frequencies(config_of(tmp_path, factors={"freqs": OTHERS}), length)
    torch.testing.assert_close(found * torch.tensor(OTHERS).double(), FREQUENCIES, rtol=1e-6, atol=0)
    assert attention == 1


def test_factors_near_llama3s_are_not_taken_for_them(tmp_path: Path) -> None:
    near = [factor * 1.01 if 1 < factor < 32 else factor for factor in llama3(32.0)]
    assert near != llama3(32.0)
    assert config_of(tmp_path, factors={"freqs": near}).rope_parameters["short_factor"] == pytest.approx(near)


@pytest.mark.parametrize("pairs", [8, 6])
def test_factors_of_phi3_change_with_the_length(tmp_path: Path, pairs: int) -> None:
    """Phi-4-mini rotates three quarters of a head, which the configuration of its file says nowhere."""
    short, long = [1.0, 1.5, *[2.0] * (pairs - 2)], [1.0, 4.0, *[32.0] * (pairs - 2)]
    config = config_of(
        tmp_path, "phi3", {"factors_short": short, "factors_long": long},
        scaling__original_context_length=2048, scaling__attn_factor=1.25,
    )  # fmt: skip
    plain = THETA ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    for length, factors in ((2048, short), (2049, long)):
        found, attention = frequencies(config, length)
        torch.testing.assert_close(found * torch.tensor(factors).double(), plain, rtol=1e-6, atol=0)
        assert attention == 1.25


def test_linear_scaling_divides_by_its_factor(tmp_path: Path) -> None:
    """Also without a type and under the key's old name."""
    for scaling in (
        {"scaling__type": "linear", "scaling__factor": 4.0},
        {"scaling__factor": 4.0},
        {"scale_linear": 4.0},
    ):
        config = config_of(tmp_path, **scaling)
        torch.testing.assert_close(frequencies(config)[0] * 4, FREQUENCIES, rtol=1e-6, atol=0)


def test_yarn_has_its_factor_and_the_papers_attention(tmp_path: Path) -> None:
    config = config_of(
        tmp_path, "qwen2", scaling__type="yarn", scaling__factor=4.0, scaling__original_context_length=32768,
        scaling__attn_factor=1.5, scaling__yarn_beta_fast=16.0,
    )  # fmt: skip
    found, attention = frequencies(config)
    assert attention == pytest.approx(1.5 * (1 + 0.1 * math.log(4)))
    ratios = FREQUENCIES / found
    assert ratios[0] == pytest.approx(1)
    assert ratios[-1] == pytest.approx(4)
    assert config.rope_parameters["original_max_position_embeddings"] == 32768
    assert config.rope_parameters["beta_fast"] == 16


def test_layers_that_see_a_window_are_not_scaled(tmp_path: Path) -> None:
    config = config_of(tmp_path, "gemma3", scaling__type="linear", scaling__factor=8.0)
    assert config.rope_parameters["sliding_attention"]["rope_type"] == "default"
    found = frequencies(config, layer_type="full_attention")[0]
    torch.testing.assert_close(found * 8, FREQUENCIES, rtol=1e-6, atol=0)


def test_pairs_that_stay_are_said_once(tmp_path: Path) -> None:
    """Gemma 4's factors of 1e30 say of three quarters of the pairs what the configuration says anyway."""
    found = config_of(tmp_path, "gemma4", {"freqs": [1.0, 1.0, *[1e30] * 6]}).rope_parameters
    assert found["full_attention"]["rope_type"] == "proportional"
    for others in ([1.0, 1.0, 1.0, *[1e30] * 5], [1.0, *[1e30] * 7]):
        with pytest.raises(InputError, match="other than to rotate 2 pairs"):
            config_of(tmp_path, "gemma4", {"freqs": others})


@pytest.mark.parametrize(
    ("factors", "scaling"),
    [
        ({}, {}),
        ({"freqs": [1.0] * PAIRS}, {}),
        ({}, {"scaling__type": "none", "scaling__factor": 4.0}),
        ({}, {"scaling__type": "linear", "scaling__factor": 1.0}),
        ({}, {"scaling__type": "yarn", "scaling__factor": 1.0}),
        ({}, {"scaling__factor": 0.0}),
    ],
)
def test_what_scales_nothing_changes_nothing(
    tmp_path: Path, factors: dict[str, list[float]], scaling: dict[str, Any]
) -> None:
    assert config_of(tmp_path, factors=factors, **scaling).rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize(
    ("factors", "scaling", "says"),
    [
        ({}, {"scaling__type": "spiral"}, "scales its positions by 'spiral', which is unknown; give the"),
        ({}, {"scaling__type": "longrope"}, "by longrope, but holds no factors"),
        (
            {},
            {"scaling__type": "linear", "scaling__factor": "two"},
            "scaling.factor is 'two', expected a num",
        ),
        ({}, {"scaling__factor": math.nan}, "scaling.factor is nan, expected a number"),
        ({}, {"scaling__factor": 2.0, "scaling__attn_factor": 1.5}, "scales attention by 1.5"),
        ({}, {"scaling__type": "yarn", "scaling__yarn_log_multiplier": 0.1}, "yarn_log_multiplier, which is"),
        ({"freqs": OTHERS}, {"scaling__factor": 2.0}, "by factors and by linear too"),
        ({"freqs": OTHERS[1:]}, {}, "holds 7 rotary factors for 8 pairs"),
        ({"freqs": [0.0, *OTHERS[1:]]}, {}, "0.0 among its rotary factors"),
        ({"freqs": [math.nan, *OTHERS[1:]]}, {}, "nan among its rotary factors"),
        ({"factors_long": OTHERS}, {}, "holds 0 values in rope_factors_short.weight, 8 in rope_factors_long"),
    ],
)
def test_what_cannot_be_carried_is_one_line(
    tmp_path: Path, factors: dict[str, list[float]], scaling: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says) as caught:
        config_of(tmp_path, factors=factors, **scaling)
    assert "\n" not in str(caught.value)


def test_factors_in_another_type_are_one_line(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("rope_freqs.weight", torch.ones(8).half().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"rope_freqs.weight is stored as F16 of 1 dimensions, expected"):
        carry_rope(LlamaConfig(), tmp_path / "model.gguf")


@pytest.fixture(scope="module")
def scaled(
    tiny_llama: Callable[..., LlamaConfig], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    def more(writer: GGUFWriter) -> None:
        add_fields(writer, {"ARCH.rope.freq_base": THETA}, {"rope_freqs.weight": OTHERS})

    return write_llama(
        tmp_path_factory.mktemp("scaled") / "base.gguf", tiny_llama(hidden_size=128, num_attention_heads=8,
        head_dim=16), tokenizer, more=more,
    )  # fmt: skip


def test_the_model_that_is_measured_turns_by_them(scaled: Path) -> None:
    found = load_model(str(scaled)).model.model.rotary_emb.inv_freq.double()
    torch.testing.assert_close(found * torch.tensor(OTHERS).double(), FREQUENCIES, rtol=1e-6, atol=0)


def test_a_compressed_model_says_so_to_every_loader(scaled: Path, text_file: Path, tmp_path: Path) -> None:
    compress(str(scaled), tmp_path / "out", Recipe.of(ratio=2, calib=str(text_file), **TEXT))
    said = json.loads((tmp_path / "out/config.json").read_text())["rope_parameters"]
    assert said["rope_type"] == "longrope"
    assert said["long_factor"] == said["short_factor"] == OTHERS
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.rotary_emb.inv_freq.double()
    torch.testing.assert_close(found * torch.tensor(OTHERS).double(), FREQUENCIES, rtol=1e-6, atol=0)


def test_a_file_made_of_one_with_factors_has_them(scaled: Path, text_file: Path, tmp_path: Path) -> None:
    made = tmp_path / "out.gguf"
    compress(str(scaled), made, Recipe.of(format="gguf", ratio=2, calib=str(text_file), **TEXT))
    tensors = {tensor.name: tensor.data.tolist() for tensor in GGUFReader(made).tensors}
    assert tensors["rope_freqs.weight"] == OTHERS
    found = load_model(str(made)).model.model.rotary_emb.inv_freq.double()
    torch.testing.assert_close(found * torch.tensor(OTHERS).double(), FREQUENCIES, rtol=1e-6, atol=0)
