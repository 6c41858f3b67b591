"""`from_pretrained` for compressed checkpoints: the quantization config and its loader.

Imported by `lrsd/__init__.py`, so that `import lrsd` is all that transformers needs.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lrsd.checkpoint.packing import FORMAT_VERSION, Packing, check_packing, packing_entry, parse_packing
from lrsd.errors import CheckpointError
from lrsd.forms.layer import Layer
from lrsd.forms.packed import PackedLinear
from lrsd.model.embedding import embedding_names, insert_embeddings, restore_embeddings
from lrsd.model.experts import fuse_experts, fusions, unfuse_experts
from lrsd.model.slots import dense_linear, weight_slot
from lrsd.numerics.compiled import in_threads
from lrsd.work.process import release_freed

# What safetensors calls the types of packed tensors; values may be of any floating-point type.
_STORED_AS = {
    torch.uint8: {"U8"}, torch.int8: {"I8"}, torch.int16: {"I16"}, torch.int32: {"I32"}, torch.int64: {"I64"},
}  # fmt: skip
_FLOATS = {"F64", "F32", "F16", "BF16"}


AUTO_QUANTIZATION_CONFIG_MAPPING.pop("lrsd", None)  # what `lrsd_cli.autoload` put there


@register_quantization_config("lrsd")
class LrsdConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json, see `checkpoint.packing`."""

    def __init__(self, **entry: Any) -> None:
        entry = {"quant_method": "lrsd", "format_version": FORMAT_VERSION, **entry}
        check_packing(entry)
        self.quant_method = "lrsd"  # type: ignore[assignment]  # transformers names its own methods only
        self.format_version = entry["format_version"]
        self.layers: dict[str, Any] = entry.get("layers") or {}
        self.embeddings: list[str] = entry.get("embeddings") or []
        self.experts: dict[str, dict[str, bool]] = entry.get("experts") or {}

    def packing(self) -> Packing:
        """Raises: CheckpointError if a layer's entry is not of the documented form."""
        return parse_packing(vars(self))


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
        names = names_in(model, [*config.layers, *config.embeddings, *config.experts])
        experts = {names[name]: fusion for name, fusion in config.experts.items() if name in names}
        if experts != fusions(model):
            raise CheckpointError(
                f"config.json has experts in {sorted(experts)}, {type(model).__name__} in "
                f"{sorted(fusions(model))}"
            )
        layers = config.packing().layers
        insert_packed(model, {names[name]: layer for name, layer in layers.items() if name in names})
        embeddings = [names[name] for name in config.embeddings if name in names]
        if not set(embeddings) <= set(embedding_names(model)):
            raise CheckpointError(
                f"config.json has embeddings {embeddings} in 8 bit; {type(model).__name__} can have "
                f"{list(embedding_names(model))}"
            )
        insert_embeddings(model, embeddings)
        if checkpoint_files:
            packed = {name: own for name, own in names.items() if name not in config.experts}
            _require_tensors(model, packed, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        layers = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}

        def decode(name: str) -> None:
            packed = layers[name]
            packed.check(name)
            if not any(parameter.is_meta for parameter in packed.parameters()):  # offloaded
                packed.release_encoded()

        in_threads(decode, layers)
        release_freed()  # what decoding took, several times the model's size
        return model

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """None: a packed checkpoint has the names of the model in memory."""
        return []

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, packed in list(model.named_modules()):
            if isinstance(packed, PackedLinear):
                model.set_submodule(name, dense_linear(packed, dtype or packed.weight.dtype))
        embeddings = self.quantization_config.embeddings
        names = names_in(model, embeddings)
        restore_embeddings(model, [names[name] for name in embeddings if name in names], dtype)
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


def names_in(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The modules of a checkpoint and what they are called in this model, which may be the bare one of the
    model with a head that was compressed, or the other way round. A head's are none of the bare one's."""
    names, prefix = list(names), f"{model.base_model_prefix}."
    modules = {name for name, _ in model.named_modules()}
    bare, headed = model.base_model is model, any(name.startswith(prefix) for name in names)
    found = {}
    for name in names:
        other = name.removeprefix(prefix) if bare else f"{prefix}{name}"
        if name not in modules and other in modules:
            found[name] = other
        elif name in modules or name.startswith(prefix) or not (bare and headed):
            found[name] = name
    return found


def insert_packed(model: PreTrainedModel, layers: Mapping[str, Layer]) -> None:
    """Replace the named linears by empty packed layers.

    Raises: CheckpointError if a name is no linear layer of this model, or too small for its form.
    """
    for name, layer in layers.items():
        try:
            slot = weight_slot(model, name)
        except (AttributeError, KeyError) as error:
            raise CheckpointError(
                f"config.json packs {name!r}, which is not a linear layer of {type(model).__name__}"
            ) from error
        shape = slot.shape
        try:
            fits = layer.fits(shape)
        except ValueError as error:
            raise CheckpointError(f"config.json: layer {name} cannot be: {error}") from error
        if not fits:
            raise CheckpointError(
                f"config.json: {layer.to_dict()} does not fit {name}, a {shape.out_features} x "
                f"{shape.in_features} layer"
            )
        slot.pack_empty(layer)


def mark_packed(
    model: PreTrainedModel, layers: Mapping[str, dict[str, Any]], embeddings: Iterable[str] = ()
) -> None:
    """Make `save_pretrained` write the packed form of a model whose layers were replaced in memory.

    layers: their entries in config.json.
    """
    config = LrsdConfig(**packing_entry(layers, embeddings, fusions(model)))
    model.config.quantization_config = config
    state = {"hf_quantizer": LrsdQuantizer(config), "is_quantized": True, "quantization_method": "lrsd"}
    state["_weight_conversions"] = []
    for name, value in state.items():
        setattr(model, name, value)


def _require_tensors(model: nn.Module, names: Mapping[str, str], checkpoint_files: list[str]) -> None:
    """transformers only warns of a missing tensor and runs on whatever memory held; one of another shape or
    type it replaces or casts.

    names: of packed modules in the checkpoint, or what a model saved them as that was loaded without its
    head, and in the model. Raises: CheckpointError.
    """
    stored: dict[str, tuple[list[int], str]] = {}
    for file in checkpoint_files:
        with safe_open(file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                part = shard.get_slice(key)
                stored[key] = part.get_shape(), part.get_dtype()
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    wanted = {}
    for name, own in names.items():
        for key, tensor in model.get_submodule(own).state_dict().items():
            places = (f"{place}.{key}" for place in (name, own, name.removeprefix(prefix)))
            wanted[next((place for place in places if place in stored), f"{name}.{key}")] = tensor
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
