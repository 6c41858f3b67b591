"""A directory, hub id or .gguf file into a model and its tokenizer. Only safetensors and GGUF are read."""

import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from lrsd.errors import InputError, LaterError, LrsdError, NumericsError
from lrsd.intake.safetensors import StoredTensor, take_inventory
from lrsd.model.gguf import take_gguf_inventory
from lrsd.model.kinds import kind_of
from lrsd.model.kinds.base import Kind
from lrsd.model.rope import carry_rope
from lrsd.model.stored import STORED_AS, left_out, native_dtype, passed_over, rounded_tensors

# Weights that a configuration may ask for per value stored: some models make others of their own; a packed
# byte holds up to 32.
_ASKED, _ASKED_PACKED = 2, 40
# Tensors that it may ask for beyond twice those stored, and bytes of tables that are not stored, of positions
# or masks. A fused tensor becomes several; GPT-2's masks take a megabyte per block.
_FREE_TENSORS, _TABLES = 1000, 2**28
# Bytes per weight of a GGUF tensor while it is decoded: codes, scales and products in float32.
_DECODING = 12
# A tokenizer that makes more tokens than this of a character, tried on these, is a bomb: bytes are the least.
_PROBE_TEXT, _MOST_TOKENS = "The quick brown fox jumps over the lazy dog.", 8
# Values checked at once: the check takes a few bytes for each.
_FINITE_VALUES = 2**22
# What is fetched of a model on the hub: the weights in one format, and what stands beside them, but no code.
_HUB_FILES = (
    "model*.safetensors", "[0-9]_*/*.safetensors", "tokenizer*", "*.json", "*.jinja", "*.txt", "*.model",
    "*.spm", "*.tiktoken", "*.codes", "README.md", "LICENSE*", "NOTICE*",
)  # fmt: skip


@dataclass(frozen=True)
class LoadedModel:
    """A dense or compressed model on its device in evaluation mode; a tokenizer, or none of a speech model.

    stored_as: how the source held the weights ("bfloat16", "GGUF Q4_1", ...), for the report. ignored: names
    of tensors that the files hold beyond the model; rounded: of those that are stored in another type than
    they are computed in, which changes their values. directory: where the files are; None of a GGUF file.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: str
    stored_as: str
    ignored: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()
    directory: Path | None = None

    @property
    def kind(self) -> Kind:
        return kind_of(self.model)

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises: InputError if there is none: speech models may come without."""
        if self.tokenizer is None:
            raise InputError(f"{self.source} has no tokenizer; put tokenizer.json next to the weights")
        return self.tokenizer

    @property
    def context_length(self) -> int | None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is None:
            return None
        # RoBERTa's positions begin after that of padding.
        paddings = (
            module.padding_idx
            for module in self.model.modules()
            if isinstance(module, nn.Embedding) and module.num_embeddings == limit
        )
        offsets = [padding + 1 for padding in paddings if padding is not None]
        return limit - max(offsets, default=0)


def load_model(
    source: str, *, dtype: str = "auto", device: str = "auto", memory: int | None = None
) -> LoadedModel:
    """Load a model, with the head that its configuration names, and its tokenizer; remote code and pickles
    are never run.

    Args: source: directory of safetensors, .gguf file, or hub id; dtype: "auto" keeps the 16-bit type that
        most weights are stored in, whatever the configuration says, and turns any other into bfloat16;
        device: "auto" is cuda where there is one; memory: bytes that may be taken by weights that are not
        used as they are stored.
    Raises: InputError naming what is missing, unreadable or too large.
    """
    try:
        return _load(source, dtype, device, memory)
    finally:
        _forget_parsed()


def _load(source: str, dtype: str, device: str, memory: int | None) -> LoadedModel:
    where, arguments = _locate(source)
    inventory = _inventory(where, arguments)
    target = resolve_device(device)
    with _unreadable(source), errors_only():
        config = AutoConfig.from_pretrained(where, **_config_arguments(arguments))
        if arguments:
            carry_rope(config, Path(where) / arguments["gguf_file"])
        native = native_dtype(config, inventory)
        computed = _resolve_dtype(dtype, native)
        _check_size(source, config, inventory)
        _check_room(source, inventory, computed, memory)
        loaded: Any = _model_class(config).from_pretrained(
            where, config=config, dtype=computed, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True, **_safe(arguments),
        )  # fmt: skip
    model, report = loaded
    _require_all_weights(source, report)
    tokenizer: PreTrainedTokenizerBase | None = None
    try:
        tokenizer = _load_tokenizer(where, source, arguments)
    except InputError:
        if kind_of(model).needs_tokenizer(model):
            raise
    nn.Module.to(model, target)
    stored_as = native
    if arguments:
        stored_as = "GGUF " + "/".join(sorted({t.dtype for t in inventory.values() if len(t.shape) > 1}))
    ignored = tuple(sorted({*report["unexpected_keys"], *left_out(model, inventory)}))
    read = {name: t for name, t in inventory.items() if name not in ignored and not passed_over(model, name)}
    rounded = () if arguments else rounded_tensors(model, read, computed)
    directory = None if arguments else Path(where)
    return LoadedModel(model.eval(), tokenizer, source, stored_as, ignored, rounded, directory)


@contextmanager
def _unreadable(source: str) -> Iterator[None]:
    """Whatever transformers and the readers below it raise for a damaged file or an impossible configuration,
    errors of every kind, is one line."""
    try:
        yield
    except (LrsdError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"cannot load {source}: {_first_line(error)}") from error


def _check_size(source: str, config: PretrainedConfig, inventory: Mapping[str, StoredTensor]) -> None:
    """Raises: InputError if a configuration asks for more weights than there are, before they take memory
    or time."""
    packed = bool(getattr(config, "quantization_config", None))
    stored = sum(tensor.numel for tensor in inventory.values())
    most = stored * (_ASKED_PACKED if packed else _ASKED)
    model = _made_empty(source, config, len(inventory))
    asked = sum(parameter.numel() for parameter in model.parameters())
    if asked > most:
        raise InputError(f"{source}: config.json asks for {asked:,} weights, the files hold {stored:,}")
    tables = sum(buffer.nbytes for buffer in model.buffers())
    if tables > _TABLES + stored:
        raise InputError(f"{source}: config.json asks for tables of {tables:,} bytes besides the weights")


def empty_model(directory: Path, tensors: int) -> PreTrainedModel:
    """The dense model that a directory's configuration describes, without memory for its weights.

    tensors: how many it stores. Raises: InputError for a configuration that asks for many more.
    """
    with _unreadable(str(directory)):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return _made_empty(str(directory), config, tensors)


def named_as_stored(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model, or of a block of it, under the names and in the shapes that its checkpoints have:
    experts one by one, for example."""
    found = revert_weight_conversion(model, tensors)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _made_empty(source: str, config: PretrainedConfig, tensors: int) -> PreTrainedModel:
    model_class = _model_class(config)
    make = getattr(model_class, "_from_config", None) or model_class.from_config
    made = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal made
        made += 1
        if made > _ASKED * tensors + _FREE_TENSORS:
            raise InputError(f"{source}: config.json asks for more than {tensors:,} tensors")

    watched = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = make(config)
    finally:
        watched.remove()
    return model


def _check_room(
    source: str, inventory: Mapping[str, StoredTensor], computed: torch.dtype, memory: int | None
) -> None:
    """Raises: InputError if the weights that are converted, and so cannot stay in their files, do not fit."""
    sizes = [t.numel for t in inventory.values() if t.dtype != STORED_AS[computed]]
    needed = computed.itemsize * sum(sizes)
    if source.endswith(".gguf"):
        needed += _DECODING * max(sizes, default=0)
    if memory is not None and needed > memory:
        raise InputError(
            f"{source} is converted to {str(computed).removeprefix('torch.')} in memory, which takes about "
            f"{needed / 1e9:.2f} GB, {memory / 1e9:.2f} GB are allowed; convert it to safetensors of that "
            "type on a larger machine, or allow more with --memory"
        )


def fingerprint(loaded: LoadedModel, weights: Iterable[tuple[str, Tensor]] | None = None) -> str:
    """A short hash of what a model's outputs depend on: all weights with their names, shapes and types, its
    configuration, its tokenizer. weights: the model's, one after the other, where they are not all in memory.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items() if weights is None else weights:
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    generation = getattr(model, "generation_config", None)
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    about: list[Any] = [config, generation.to_dict() if generation is not None else None]
    if tokenizer is not None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        vocabulary = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
        about += [vocabulary, tokenizer.special_tokens_map, tokenizer.chat_template]
    digest.update(json.dumps(about, default=str).encode())
    return digest.hexdigest()[:16]


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises: NumericsError if the tensor holds NaN or infinity."""
    parts = tensor.detach().flatten().split(_FINITE_VALUES)
    if bad := int(sum((~torch.isfinite(part)).sum() for part in parts)):
        raise NumericsError(
            f"{name} holds {bad} non-finite values of {tensor.numel()}; the checkpoint is damaged, "
            "or its numbers do not fit the chosen --dtype"
        )


def resolve_device(device: str) -> torch.device:
    """ "auto" is the accelerator, if there is one with float64 (cuda, xpu), else cpu.

    Raises: InputError for a device torch does not have.
    """
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return exact_device(accelerator or torch.device("cpu"))
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} is not available: {_first_line(error)}") from error


def exact_device(device: torch.device) -> torch.device:
    """Where the moments and solvers of a model on that device are: on it, or on cpu if it has no float64
    (mps, and some of Intel's)."""
    try:
        torch.ones(1, dtype=torch.float64, device=device) + 1
    except (RuntimeError, TypeError, AssertionError):
        return torch.device("cpu")
    return device


def _model_class(config: PretrainedConfig) -> Any:
    """The class that the configuration names; a language model where it names none.

    Raises: InputError if that class is of another kind of model than the configuration.
    """
    named: Any = getattr(transformers, (config.architectures or [""])[0], None)
    is_model = isinstance(named, type) and issubclass(named, PreTrainedModel)
    if is_model and named.config_class and not isinstance(config, named.config_class):
        raise InputError(
            f"cannot load a {named.__name__} from the configuration of a {config.model_type} model; "
            "the architectures and the model_type in config.json must agree"
        )
    return named if is_model else AutoModelForCausalLM


def _locate(source: str) -> tuple[str, dict[str, Any]]:
    """A local directory, and further arguments for transformers where a GGUF file in it is meant."""
    path = Path(source)
    if path.suffix == ".gguf" or path.is_file():
        if not path.is_file():
            raise InputError(f"no such file: {source}")
        if path.suffix != ".gguf":
            raise InputError(
                f"{source}: expected a model directory, a hub id or a .gguf file, got another file"
            )
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        return source, {}
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise InputError(f"no such model directory: {source}")
    with _unreadable(f"{source}, which is no directory here, from the hub"):
        try:
            return snapshot_download(source, allow_patterns=list(_HUB_FILES)), {}
        except LocalEntryNotFoundError as error:
            if HF_HUB_OFFLINE:
                raise
            raise LaterError(
                f"{source} is no directory here, and the hub does not answer; check the name, or the network"
            ) from error


def _inventory(where: str, arguments: dict[str, Any]) -> dict[str, StoredTensor]:
    """Raises: InputError for files that are not in order, or if what reads GGUF is not installed."""
    if "gguf_file" not in arguments:
        return take_inventory(Path(where))
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"reading a .gguf file needs {' and '.join(missing)}: pip install 'lrsd[gguf]'")
    return take_gguf_inventory(Path(where) / arguments["gguf_file"])


@contextmanager
def without_bars() -> Iterator[None]:
    """transformers without progress bars, those of GGUF included, which it does not switch off itself; the
    hub's stay, which show on a terminal only. For a process of lrsd's own."""

    def silent(factory: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return transformers_logging.EmptyTqdm(*arguments, **options)

    reading: Any = modeling_gguf_pytorch_utils
    bars = reading.tqdm
    before = transformers_logging.set_tqdm_hook(silent)
    reading.tqdm = transformers_logging.tqdm
    try:
        yield
    finally:
        reading.tqdm = bars
        transformers_logging.set_tqdm_hook(before)


@contextmanager
def gguf_parsed_once() -> Iterator[None]:
    """One parse of a GGUF file's header for each `load_model` instead of four: transformers reads it anew,
    seconds each time, for configuration, weights and tokenizer. For a process of lrsd's own."""
    if importlib.util.find_spec("gguf") is None:
        yield
        return
    import gguf

    reader = gguf.GGUFReader
    setattr(gguf, "GGUFReader", cache(reader))  # noqa: B010 - a class for mypy
    try:
        yield
    finally:
        setattr(gguf, "GGUFReader", reader)  # noqa: B010


def _forget_parsed() -> None:
    """A parsed header may take hundreds of megabytes: it goes once the model is there."""
    forget = getattr(getattr(sys.modules.get("gguf"), "GGUFReader", None), "cache_clear", None)
    if forget is not None:
        forget()


def _config_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"trust_remote_code": False, **arguments}


def _safe(arguments: dict[str, Any]) -> dict[str, Any]:
    if "gguf_file" not in arguments:
        return {"use_safetensors": True}
    # Releases without this class, before 5.19, always decode.
    config = getattr(transformers, "GgufConfig", None)
    return {**arguments, **({"quantization_config": config(dequantize=True)} if config else {})}


def _require_all_weights(source: str, report: dict[str, Any]) -> None:
    """transformers only warns of weights that are missing or do not fit, and makes them random."""
    for name, stored, expected in sorted(report["mismatched_keys"]):
        raise InputError(f"{source}: {name} is {tuple(stored)}, config.json asks for {tuple(expected)}")
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{source} lacks {len(missing)} of the model's weights, {missing[0]} among them")


@contextmanager
def errors_only() -> Iterator[None]:
    """Without what transformers logs below an error: a table of weights that do not fit, which become one."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _load_tokenizer(where: str, source: str, arguments: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        with panics():
            tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **arguments)
            length = len(tokenizer(_PROBE_TEXT).input_ids)
    except Exception as error:  # tokenizer back ends raise errors of every kind for a missing file
        raise InputError(
            f"{source} has no usable tokenizer ({_first_line(error)}); put tokenizer.json next to the weights"
        ) from error
    if length > _MOST_TOKENS * len(_PROBE_TEXT):
        raise InputError(
            f"the tokenizer of {source} makes {length:,} tokens of {len(_PROBE_TEXT)} characters"
        )
    return tokenizer


@contextmanager
def panics() -> Iterator[None]:
    """A tokenizer's back end in Rust ends in its own kind of BaseException: an ordinary error from here on.

    Raises: RuntimeError.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(f"the tokenizer panicked: {_first_line(error)}") from error


def _resolve_dtype(dtype: str, native: str) -> torch.dtype:
    if dtype == "auto":
        return torch.float16 if native == "float16" else torch.bfloat16
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[dtype]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
