"""`from_pretrained` for compressed checkpoints: the quantisation config and its loader.

Imported by `lrsd/__init__.py`, so that `import lrsd` is all that transformers needs.
"""

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lrsd.errors import CheckpointError
from lrsd.forms.packed import LayerFormat, LowRankSparseLinear
from lrsd.model.embedding import embedding_names, insert_embeddings, restore_embeddings
from lrsd.model.experts import fuse_experts, fusions, unfuse_experts
from lrsd.model.slots import dense_linear
from lrsd.numerics.allocate import Shape

FORMAT_VERSION = 1
# What safetensors calls the types of packed tensors; values may be of any floating-point type.
_STORED_AS = {torch.uint8: {"U8"}, torch.int8: {"I8"}, torch.int16: {"I16"}, torch.int32: {"I32"}}
_FLOATS = {"F64", "F32", "F16", "BF16"}
# Largest number in a layer's entry: more would be no layer of any model.
_LARGEST = 2**40
# Eighths of an octave: float32 ends at 2^127.
_LARGEST_EXPONENT = 8 * 127


@register_quantization_config("lrsd")
class LrsdConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json: the format of every packed layer, by module name, and the
    names of embedding and head where these are in 8 bit, and the modules of experts that were taken apart,
    with how the model had them fused."""

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        embeddings: list[str] | None = None,
        experts: dict[str, dict[str, bool]] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = "lrsd"  # type: ignore[assignment]  # transformers names its own methods only
        self.format_version = format_version
        self.layers = layers or {}
        self.embeddings = embeddings or []
        self.experts = experts or {}
        if not (
            isinstance(self.layers, dict)
            and isinstance(self.embeddings, list)
            and all(isinstance(name, str) for name in self.embeddings)
            and isinstance(self.experts, dict)
            and all(_is_fusion(fusion) for fusion in self.experts.values())
        ):
            raise CheckpointError(
                "config.json: quantization_config needs an object of layers, a list of embeddings and an "
                "object of experts"
            )
        if format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"checkpoint has format version {format_version}, this lrsd reads {FORMAT_VERSION}; "
                "install the lrsd release that wrote it"
            )

    def formats(self) -> dict[str, LayerFormat]:
        """Raises: CheckpointError if a layer's entry is not of the documented form."""
        return {name: parse_format(name, entry) for name, entry in self.layers.items()}


def _is_fusion(fusion: Any) -> bool:
    return isinstance(fusion, dict) and all(type(fusion.get(key)) is bool for key in ("gated", "transposed"))


def parse_format(name: str, entry: Any) -> LayerFormat:
    """One layer's entry in config.json. Raises: CheckpointError naming the layer."""
    known = {field.name for field in fields(LayerFormat)}
    if not isinstance(entry, dict) or not set(entry) <= known or "rank" not in entry:
        raise CheckpointError(
            f"config.json: layer {name} must be an object with 'rank' and any of {sorted(known)}"
        )
    counts = ("rank", "columns", "rows", "entries", "stream", "bits", "group")
    numbers = [entry[key] for key in counts if key in entry]
    if any(type(value) is not int or not 0 <= value < _LARGEST for value in numbers):
        raise CheckpointError(f"config.json: layer {name} needs non-negative whole numbers, got {entry}")
    flags = [entry[key] for key in ("pivoted", "bias", "added_bias", "transposed") if key in entry]
    if any(type(flag) is not bool for flag in flags):
        raise CheckpointError(f"config.json: layer {name} needs true or false for its flags, got {entry}")
    layout = LayerFormat(**entry)
    fixed = layout.bits is not None
    if fixed and (not 1 <= (layout.bits or 0) <= 8 or layout.group < 1 or layout.stream is not None):
        raise CheckpointError(
            f"config.json: layer {name} needs codes of 1 to 8 bits in groups of 1 or more, got {entry}"
        )
    if type(layout.exponent) is not int or abs(layout.exponent) > _LARGEST_EXPONENT:
        raise CheckpointError(f"config.json: layer {name} has no usable exponent of its steps: {entry}")
    if (fixed or layout.stream is not None) and (layout.rows or layout.entries is not None):
        raise CheckpointError(f"config.json: layer {name} has codes beside rows or entries, got {entry}")
    return layout


@register_quantizer("lrsd")
class LrsdQuantizer(HfQuantizer):
    """Puts packed layers into the empty model before transformers fills in the tensors."""

    requires_calibration = True  # a dense checkpoint cannot be compressed by passing LrsdConfig

    quantization_config: LrsdConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        config = self.quantization_config
        if config.experts:
            unfuse_experts(model)
        if config.experts != fusions(model):
            raise CheckpointError(
                f"config.json has experts in {sorted(config.experts)}, {type(model).__name__} in "
                f"{sorted(fusions(model))}"
            )
        insert_packed(model, config.formats())
        if not set(config.embeddings) <= set(embedding_names(model)):
            raise CheckpointError(
                f"config.json has embeddings {config.embeddings} in 8 bit; {type(model).__name__} can have "
                f"{list(embedding_names(model))}"
            )
        insert_embeddings(model, config.embeddings)
        if checkpoint_files:
            _require_tensors(model, [*config.layers, *config.embeddings], checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name in self.quantization_config.layers:
            packed = model.get_submodule(name)
            assert isinstance(packed, LowRankSparseLinear)
            packed.check(name)
        return model

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """None: a packed checkpoint has the names of the model in memory."""
        return []

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name in self.quantization_config.layers:
            packed = model.get_submodule(name)
            assert isinstance(packed, LowRankSparseLinear)
            model.set_submodule(name, dense_linear(packed, dtype or packed.weight.dtype))
        restore_embeddings(model, self.quantization_config.embeddings, dtype)
        fuse_experts(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def insert_packed(model: PreTrainedModel, formats: dict[str, LayerFormat]) -> None:
    """Replace the named linears by empty packed layers of the given formats.

    Raises: CheckpointError if a name is no linear layer of this model, or too small for its format.
    """
    for name, layout in formats.items():
        try:
            old = model.get_submodule(name)
        except AttributeError:
            old = None
        if not isinstance(old, nn.Linear | Conv1D):
            raise CheckpointError(
                f"config.json packs {name!r}, which is not a linear layer of {type(model).__name__}"
            )
        sizes = old.weight.shape[::-1] if isinstance(old, Conv1D) else old.weight.shape
        rank_limit = min(
            sizes[0] - layout.rows, sizes[1] - (0 if layout.entries is not None else layout.columns)
        )
        if not layout.rank <= rank_limit or not layout.columns <= sizes[1]:
            raise CheckpointError(
                f"config.json: {layout} does not fit {name}, a {sizes[0]} x {sizes[1]} layer"
            )
        model.set_submodule(name, LowRankSparseLinear(Shape(*sizes), layout, old.weight.dtype))


def mark_packed(
    model: PreTrainedModel, formats: dict[str, LayerFormat], embeddings: Iterable[str] = ()
) -> None:
    """Make `save_pretrained` write the packed form of a model whose layers were replaced in memory."""
    layers = {name: layout.to_dict() for name, layout in formats.items()}
    config = LrsdConfig(layers=layers, embeddings=list(embeddings), experts=fusions(model))
    model.config.quantization_config = config
    state = {"hf_quantizer": LrsdQuantizer(config), "is_quantized": True, "quantization_method": "lrsd"}
    state["_weight_conversions"] = []
    for name, value in state.items():
        setattr(model, name, value)


def _require_tensors(model: nn.Module, layers: Iterable[str], checkpoint_files: list[str]) -> None:
    """transformers only warns of a missing tensor and runs on whatever memory held; one of another shape or
    type it replaces or casts.

    Raises: CheckpointError.
    """
    stored: dict[str, tuple[list[int], str]] = {}
    for file in checkpoint_files:
        with safe_open(file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                part = shard.get_slice(key)
                stored[key] = part.get_shape(), part.get_dtype()
    wanted = {
        f"{name}.{key}": tensor
        for name in layers
        for key, tensor in model.get_submodule(name).state_dict().items()
    }
    if missing := sorted(set(wanted) - set(stored)):
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} of the packed tensors, {missing[0]} among them; "
            "it is incomplete: copy or compress it again"
        )
    for name, tensor in wanted.items():
        shape, dtype = stored[name]
        if shape != list(tensor.shape) or dtype not in _STORED_AS.get(tensor.dtype, _FLOATS):
            raise CheckpointError(
                f"{name} is {dtype} {tuple(shape)}; config.json asks for {tensor.dtype} {tuple(tensor.shape)}"
            )
