"""`from_pretrained` for compressed checkpoints: the quantization config and its loader.

Imported by `lrsd/__init__.py`, so that `import lrsd` is all that transformers needs.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
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

# What safetensors calls the types of packed tensors; values may be of any floating-point type.
_STORED_AS = {
    torch.uint8: {"U8"}, torch.int8: {"I8"}, torch.int16: {"I16"}, torch.int32: {"I32"}, torch.int64: {"I64"},
}  # fmt: skip
_FLOATS = {"F64", "F32", "F16", "BF16"}


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
        if config.experts != fusions(model):
            raise CheckpointError(
                f"config.json has experts in {sorted(config.experts)}, {type(model).__name__} in "
                f"{sorted(fusions(model))}"
            )
        insert_packed(model, config.packing().layers)
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
        layers = {name: model.get_submodule(name) for name in self.quantization_config.layers}

        def decode(name: str) -> None:
            packed = layers[name]
            assert isinstance(packed, PackedLinear)
            packed.check(name)
            if not any(parameter.is_meta for parameter in packed.parameters()):  # offloaded
                packed.release_encoded()

        in_threads(decode, layers)
        return model

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """None: a packed checkpoint has the names of the model in memory."""
        return []

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name in self.quantization_config.layers:
            packed = model.get_submodule(name)
            assert isinstance(packed, PackedLinear)
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
        if not layer.fits(shape):
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
