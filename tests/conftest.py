"""Tiny random models with a real tokenizer, and a text to calibrate on. Nothing is downloaded."""

import os
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deprecations import pytest_configure  # noqa: F401 - a hook
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# Read when the libraries are imported, here and in processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

MakeModel = Callable[..., Path]

# Matrices this small gain nothing from a second thread, and on a busy machine lose a factor of ten.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-golden", action="store_true", help="write tests/golden.json anew")
    parser.addoption("--every-family", action="store_true", help="the simulated device: those alike, too")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The real model's tests take minutes in one process: they begin first, beside all others."""
    items.sort(key=lambda item: item.path.name != "test_real.py")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60,000 characters of English that every Python installation holds."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n\n".join(pydoc_data.topics.topics.values())[:60_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(text_file: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 300 tokens: two special ones, 256 bytes, and the commonest pairs."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train([str(text_file)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", mask_token="<mask>"
    )


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaConfig]:
    """Grouped-query attention, two blocks, 300 tokens; weights large enough that the logits differ."""

    def config(**changes: object) -> LlamaConfig:
        return LlamaConfig(**{
            "vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
            **changes,
        })  # fmt: skip

    return config


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> MakeModel:
    """A model directory of random bfloat16 weights for a configuration, the tokenizer beside them."""

    def make(config: PretrainedConfig, auto: Any = AutoModelForCausalLM) -> Path:
        directory = tmp_path_factory.mktemp(config.model_type) / "model"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = auto.from_config(config, dtype=torch.bfloat16)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 1:  # biases of 0 and gains of 1 would hide what is lost
                        parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def tiny_model_dir(make_model: MakeModel, tiny_llama: Callable[..., LlamaConfig]) -> Path:
    return make_model(tiny_llama())
