"""Serve compressed checkpoints with vLLM: a plugin that vLLM imports by its entry point.

    vllm serve OUT

Written against vLLM's main branch: layers/linear.py of commit 0036d38, quantization/base_config.py of
026bb17, model_loader/default_loader.py of 00b5ad0; vLLM 0.19.1 is the first release that takes
transformers 5. Tested against a stub of that interface, and tried in vLLM's CPU build 0.32
(`scripts/vllm_check.py`); never on a GPU.

vLLM fuses linears that read the same input, q/k/v and gate/up. The checkpoint holds each under its own
name, with tensors that differ in kind and size, and vLLM's loaders hand them over one by one, as
`weight_loader(param, tensor, shard_id)` of the fused layer's parameter of that kind. So a layer gets one
empty parameter per kind of tensor ("codes", "steps", "weight", ...), whose loader copies the tensor into
the packed linear it belongs to. Those are what `apply` runs, one after the other.

Limits: tensor parallel size 1; no packed experts; embeddings at 16 bit; only biases that the model itself
has; no model whose vLLM loader changes the order of a weight's rows (Llama 4: not detected). Codes are
widened to 16 bit at every product, there is no kernel for them. `--structure unstructured` and `--method
ssd` expand a bitmask at every product, which CUDA graphs cannot capture: they need `--enforce-eager`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.utils import set_weight_attrs

from lrsd.checkpoint.packing import parse_packing
from lrsd.errors import CheckpointError
from lrsd.forms.base import Shape
from lrsd.forms.layer import Layer
from lrsd.forms.packed import PackedLinear

# Volta, the oldest that vLLM runs on: the packed layers are plain torch.
_MIN_CAPABILITY = 70
# How vLLM calls the parts of a QKVParallelLinear; those of a MergedColumnParallelLinear are numbered.
_QKV = {"q": 0, "k": 1, "v": 2}
# Fused in the checkpoint too, its outputs in vLLM's order (Phi-3, GPT-2). Others, query_key_value for one,
# are ordered by head, and vLLM's loaders turn rows of a dense weight around.
_STORED_FUSED = {"qkv_proj", "gate_up_proj", "c_attn"}


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; vLLM may call it several times in a process."""
    if "lrsd" not in QUANTIZATION_METHODS:
        register_quantization_config("lrsd")(LrsdQuantizationConfig)


class LrsdQuantizationConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is not installed with us
    """vLLM's view of `quantization_config` in config.json."""

    def __init__(self, formats: dict[str, Layer]) -> None:
        super().__init__()
        self.formats = formats

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LrsdQuantizationConfig":
        """Raises: CheckpointError for a malformed entry; ValueError for what vLLM cannot serve."""
        stored = parse_packing(config)
        if stored.embeddings:
            raise ValueError(
                f"{list(stored.embeddings)} are stored in 8 bit, which lrsd cannot serve with vLLM; "
                "compress with the default `--scope linear`"
            )
        if config.get("experts"):
            raise ValueError(
                f"{next(iter(config['experts']))} holds experts taken apart, which vLLM would look for in "
                "fused tensors; write dense weights with `lrsd export`"
            )
        added = [name for name, layer in stored.layers.items() if layer.added_bias]
        if added:
            raise ValueError(
                f"{added[0]} has a bias that the model itself lacks, and vLLM has no place for it; "
                "compress without `--mean-correction`"
            )
        return cls(stored.layers)

    def get_name(self) -> str:
        return "lrsd"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return _MIN_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all of it is in config.json

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Called with the names that this model's modules have in vLLM, where they differ."""
        self.formats = hf_to_vllm_mapper.apply_dict(self.formats)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The packed method for layers with a packed part, vLLM's own for dense linears, None for others."""
        if not isinstance(layer, LinearBase):
            return None
        names = self._stored_names(prefix)
        if not any(name in self.formats for name in names):
            return UnquantizedLinearMethod()
        return LrsdLinearMethod({name: self.formats.get(name) for name in names})

    def _stored_names(self, prefix: str) -> list[str]:
        """Names in the checkpoint of what vLLM calls `prefix`: itself, or the parts that it fuses."""
        parent, _, leaf = prefix.rpartition(".")
        if prefix in self.formats or leaf not in self.packed_modules_mapping:
            return [prefix]
        return [f"{parent}.{part}" if parent else part for part in self.packed_modules_mapping[leaf]]


class LrsdLinearMethod(LinearMethodBase):  # type: ignore[misc]  # vLLM is not installed with us
    """One vLLM layer of which at least one part is packed.

    formats: by name in the checkpoint, in the order of the outputs; None: that part stayed dense.
    """

    def __init__(self, formats: dict[str, Layer | None]) -> None:
        self.formats = formats

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Raises: ValueError under tensor parallelism, or for a fusion that config.json does not match."""
        first = next(iter(self.formats))
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise ValueError(
                f"{first} is split over several GPUs, which packed layers cannot be; "
                "serve with tensor_parallel_size=1, or write dense weights with `lrsd export`"
            )
        whole = len(self.formats) == 1 and first.rpartition(".")[2] in _STORED_FUSED
        sizes = [output_size] if whole else output_partition_sizes
        if len(sizes) != len(self.formats):
            raise ValueError(
                f"vLLM has {len(sizes)} linears where the checkpoint has {list(self.formats)}; lrsd does not "
                "know how this model orders their outputs, write dense weights with `lrsd export`"
            )
        parts = {
            name: _empty_linear(Shape(size, input_size), layout, params_dtype)
            for size, (name, layout) in zip(sizes, self.formats.items(), strict=True)
        }
        layer.lrsd = PackedParts(parts)
        for kind in layer.lrsd.kinds:
            placeholder = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
            set_weight_attrs(placeholder, {"weight_loader": layer.lrsd.loader(kind)})
            layer.register_parameter(kind, placeholder)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Raises: CheckpointError if tensors are missing, or codes damaged."""
        packed = layer.lrsd
        assert isinstance(packed, PackedParts)
        packed.finish()
        for kind in packed.kinds:  # so that a later load fails instead of leaving old codes in use
            delattr(layer, kind)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        assert isinstance(layer.lrsd, PackedParts)
        y = layer.lrsd(x)
        return y if bias is None else y + bias


class PackedParts(nn.Module):
    """The linears behind one vLLM layer, by name in the checkpoint, without biases: those are vLLM's."""

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.names, self.parts = list(parts), nn.ModuleList(parts.values())
        of_parts = {name: [kind for kind, _ in part.named_parameters()] for name, part in parts.items()}
        self.kinds = sorted({kind for kinds in of_parts.values() for kind in kinds})
        self.missing = {f"{name}.{kind}" for name, kinds in of_parts.items() for kind in kinds}

    def forward(self, x: Tensor) -> Tensor:
        outputs = [part(x) for part in self.parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def loader(self, kind: str) -> Callable[..., None]:
        """The `weight_loader` of the parameter that stands for all parts' tensors of this kind."""

        def weight_loader(
            param: nn.Parameter, loaded_weight: Tensor, loaded_shard_id: int | str | None = None
        ) -> None:
            self.load(kind, loaded_weight, loaded_shard_id)

        return weight_loader

    def load(self, kind: str, loaded: Tensor, shard_id: int | str | None) -> None:
        """Copy a tensor of the checkpoint into the part it belongs to; shard_id is None if there is one.

        Raises: ValueError if it belongs to none of them, or has another shape.
        """
        index = 0 if shard_id is None and len(self.names) == 1 else _QKV.get(str(shard_id), shard_id)
        if not isinstance(index, int) or index not in range(len(self.names)):
            raise ValueError(f"{self.names} have no part {shard_id!r} that a tensor {kind!r} could belong to")
        name, part = f"{self.names[index]}.{kind}", self.parts[index]
        if isinstance(part, PackedLinear) and part.layer.transposed and kind == "weight":
            loaded = loaded.t()  # vLLM turns around whatever the checkpoint calls the weight of a Conv1D
        target = dict(part.named_parameters()).get(kind)
        if target is None or target.shape != loaded.shape:
            expected = "no such tensor" if target is None else f"shape {tuple(target.shape)}"
            raise ValueError(
                f"{name}: config.json tells of {expected}, the checkpoint holds {tuple(loaded.shape)}"
            )
        target.data.copy_(loaded)
        self.missing.discard(name)

    def finish(self) -> None:
        """Check that all tensors have come, and decode the codes once for all."""
        if self.missing:
            raise CheckpointError(
                f"the checkpoint lacks {', '.join(sorted(self.missing))}; "
                "it is incomplete: copy or compress it again"
            )
        for part in self.parts:
            assert isinstance(part, PackedLinear | nn.Linear)
            # The first product decodes; vLLM could neither compile nor capture that.
            part(part.weight.new_zeros(1, part.in_features))
            if isinstance(part, PackedLinear):
                part.release_encoded()  # vLLM never saves: one byte a weight is enough


def _empty_linear(shape: Shape, layout: Layer | None, dtype: torch.dtype) -> nn.Module:
    if layout is not None:
        return PackedLinear(shape, replace(layout, bias=False, added_bias=False), dtype)
    dense = nn.Linear(shape.in_features, shape.out_features, bias=False, device="meta", dtype=dtype)
    return dense.to_empty(device=torch.get_default_device()).requires_grad_(False)
