"""A directory, hub id or .gguf file into a model and its tokenizer. Only safetensors and GGUF are read."""

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from lrsd.errors import InputError, NumericsError
from lrsd.model.samples import Kind, kind_of

# What transformers and the readers below it raise for a damaged file or an impossible configuration.
_UNREADABLE = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip
# Values checked at once: the check takes a few bytes for each.
_FINITE_VALUES = 2**22
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class LoadedModel:
    """A dense or compressed model on its device in evaluation mode; a tokenizer unless it hears sound.

    stored_as: how the source held the weights ("bfloat16", "GGUF Q4_1", ...), for the report.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: str
    stored_as: str

    @property
    def kind(self) -> Kind:
        return kind_of(self.model)

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises: InputError if there is none: models that hear may come without."""
        if self.tokenizer is None:
            raise InputError(f"{self.source} has no tokenizer; put tokenizer.json beside the weights")
        return self.tokenizer

    @property
    def context_length(self) -> int | None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is None:
            return None
        # RoBERTa's positions begin behind that of padding.
        paddings = (
            module.padding_idx
            for module in self.model.modules()
            if isinstance(module, nn.Embedding) and module.num_embeddings == limit
        )
        offsets = [padding + 1 for padding in paddings if padding is not None]
        return limit - max(offsets, default=0)


def load_model(source: str, *, dtype: str = "auto", device: str = "auto") -> LoadedModel:
    """Load a model, with the head that its configuration names, and its tokenizer; remote code and pickles
    are never run.

    Args: source: directory of safetensors, .gguf file, or hub id; dtype: "auto" keeps a 16-bit
        model as it is and turns any other into bfloat16; device: "auto" is cuda where there is one.
    Raises: InputError naming what is missing or unreadable.
    """
    with _gguf_parsed_once():
        return _load(source, dtype, device)


def _load(source: str, dtype: str, device: str) -> LoadedModel:
    where, arguments, stored_as = _locate(source)
    target = resolve_device(device)
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(where, **_config_arguments(arguments))
        native = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
        chosen = _resolve_dtype(dtype, native)
        with _errors_only():
            loaded: Any = _model_class(config).from_pretrained(
                where, config=config, dtype=chosen, trust_remote_code=False, output_loading_info=True,
                ignore_mismatched_sizes=True, **_safe(arguments),
            )  # fmt: skip
    except _UNREADABLE as error:
        place = source if Path(source).exists() else f"{source}, which is no directory here, from the hub"
        raise InputError(f"cannot load {place}: {_first_line(error)}") from error
    model, report = loaded
    _require_all_weights(source, report)
    tokenizer: PreTrainedTokenizerBase | None = None
    try:
        tokenizer = _load_tokenizer(where, source, arguments)
    except InputError:
        if model.main_input_name != "input_features":
            raise
    nn.Module.to(model, target)
    return LoadedModel(model.eval(), tokenizer, source, stored_as or native)


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A short hash of all weights with their names, shapes and types."""
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises: NumericsError if the tensor holds NaN or infinity."""
    parts = tensor.detach().flatten().split(_FINITE_VALUES)
    bad = sum(int((~torch.isfinite(part)).sum()) for part in parts)
    if bad:
        raise NumericsError(
            f"{name} holds {bad} non-finite values of {tensor.numel()}; the checkpoint is damaged, "
            "or its numbers do not fit the chosen --dtype"
        )


def resolve_device(device: str) -> torch.device:
    """ "auto" is cuda, then mps, then cpu. Raises: InputError for a device torch does not have."""
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} is not available: {_first_line(error)}") from error


def _model_class(config: PretrainedConfig) -> Any:
    """The class that the configuration names; a language model where it names none.

    Raises: InputError if that class is of another kind of model than the configuration.
    """
    named: Any = getattr(transformers, (config.architectures or [""])[0], None)
    is_text_model = isinstance(named, type) and issubclass(named, PreTrainedModel)
    if is_text_model and named.config_class and not isinstance(config, named.config_class):
        raise InputError(
            f"cannot load a {named.__name__} from the configuration of a {config.model_type} model; "
            "the architectures and the model_type in config.json must agree"
        )
    several_media = not config.is_encoder_decoder and "ConditionalGeneration" in str(named)
    return named if is_text_model and not several_media else AutoModelForCausalLM


def copy_processor(source: str, target: Path) -> None:
    """The files beside the weights by which sound or images become inputs, where the source has any."""
    if source.endswith(".gguf"):
        return
    for name in _PROCESSOR_FILES:
        path = cached_file(
            source, name, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        if path is not None:
            shutil.copyfile(path, target / name)


def _locate(source: str) -> tuple[str, dict[str, Any], str | None]:
    path = Path(source)
    if path.suffix == ".gguf" or path.is_file():
        if not path.is_file():
            raise InputError(f"no such file: {source}")
        if path.suffix != ".gguf":
            raise InputError(
                f"{source}: expected a model directory, a hub id or a .gguf file, got another file"
            )
        return str(path.parent), {"gguf_file": path.name}, _gguf_storage(path)
    if path.is_dir():
        _check_directory(path)
        return source, {}, None
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InputError(f"no such model directory: {source}")
    return source, {}, None


def _check_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise InputError(f"{path} holds no config.json; expected a transformers model directory")
    if any(path.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
    if pickles:
        raise InputError(
            f"{path} holds its weights as pickle ({pickles[0]}), which can run code when read; "
            "convert it to safetensors first (save_pretrained does)"
        )
    raise InputError(f"{path} holds no .safetensors file")


def _gguf_storage(path: Path) -> str:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"reading {path.name} needs {' and '.join(missing)}: pip install 'lrsd[gguf]'")
    from gguf import GGUFReader

    try:
        kinds = {tensor.tensor_type.name for tensor in GGUFReader(path).tensors if tensor.shape.size > 1}
    except (ValueError, OSError, IndexError) as error:
        raise InputError(f"{path} is not a readable GGUF file: {_first_line(error)}") from error
    return f"GGUF {'/'.join(sorted(kinds))}"


@contextmanager
def _gguf_parsed_once() -> Iterator[None]:
    """One parse of a GGUF file's header instead of four: transformers reads it anew, seconds each
    time, for configuration, weights and tokenizer.
    """
    if importlib.util.find_spec("gguf") is None:
        yield
        return
    import gguf

    reader = gguf.GGUFReader
    parsed = cache(reader)
    setattr(gguf, "GGUFReader", lambda path: parsed(str(path)))  # noqa: B010 - a class for mypy
    try:
        yield
    finally:
        setattr(gguf, "GGUFReader", reader)  # noqa: B010


def _config_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"trust_remote_code": False, **arguments}


def _safe(arguments: dict[str, Any]) -> dict[str, Any]:
    if "gguf_file" not in arguments:
        return {"use_safetensors": True}
    from transformers import GgufConfig

    return {**arguments, "quantization_config": GgufConfig(dequantize=True)}


def _require_all_weights(source: str, report: dict[str, Any]) -> None:
    """transformers only warns of weights that are missing or do not fit, and makes them random."""
    for name, stored, expected in sorted(report["mismatched_keys"]):
        raise InputError(f"{source}: {name} is {tuple(stored)}, config.json asks for {tuple(expected)}")
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{source} lacks {len(missing)} of the model's weights, {missing[0]} among them")


@contextmanager
def _errors_only() -> Iterator[None]:
    """Without the table that transformers logs of weights that do not fit: they become an error."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _load_tokenizer(where: str, source: str, arguments: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False, **arguments)
    except Exception as error:  # tokenizer back ends raise errors of every kind for a missing file
        raise InputError(
            f"{source} has no usable tokenizer ({_first_line(error)}); put tokenizer.json beside the weights"
        ) from error


def _resolve_dtype(dtype: str, native: str) -> torch.dtype:
    if dtype == "auto":
        return torch.float16 if native == "float16" else torch.bfloat16
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[dtype]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def read_json(path: Path) -> dict[str, Any]:
    """Raises: InputError if the file is not a JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not readable JSON: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
