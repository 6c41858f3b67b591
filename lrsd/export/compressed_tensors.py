"""The compressed-tensors format ("pack-quantized"), which vLLM, SGLang and transformers load without lrsd."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from lrsd.checkpoint.manifest import read_manifest
from lrsd.checkpoint.reader import StoredLayer, StoredModel
from lrsd.errors import CheckpointError, InputError
from lrsd.export.base import plain_config, write_export
from lrsd.export.dense import dense_tensors
from lrsd.forms.layer import Layer
from lrsd.forms.symmetric import Symmetric


def export_compressed_tensors(
    directory: Path, target: Path, progress: Callable[[str], None] = lambda name: None
) -> int:
    """Write integers and scales as they are stored, under the names and with the `quantization_config` of
    compressed-tensors; nothing is rounded anew.

    Returns: bytes of tensors written. Raises: CheckpointError if a layer is stored as anything else.
    """
    stored = StoredModel(directory)
    forms = {name: _form(name, layer) for name, layer in stored.packing.layers.items()}
    if stored.packing.experts:
        raise CheckpointError(
            f"{next(iter(stored.packing.experts))} holds experts taken apart, for which compressed-tensors "
            "has no names that engines agree on; use lrsd export --format dense"
        )

    def tensors_of(layer: StoredLayer) -> Iterator[tuple[str, Tensor]]:
        if layer.name not in forms:
            yield from dense_tensors(stored, layer)
            return
        names = [
            "weight_packed",
            "weight_scale",
            "weight_shape",
            *(["bias"] if "bias" in layer.tensors else []),
        ]
        for name in names:
            yield f"{layer.name}.{name}", layer.tensors[name].contiguous()

    config = plain_config(stored) | {"quantization_config": _quantization(stored, forms)}
    return write_export(stored, target, tensors_of, config, progress)


def require_package() -> None:
    """Raises: InputError if the package of the format is not installed."""
    if find_spec("compressed_tensors") is None:
        raise InputError(
            "the format compressed-tensors needs the package of that name; try: pip install "
            "compressed-tensors, or 'lrsd[compressed-tensors]'"
        )


def _form(name: str, layer: Layer) -> Symmetric:
    kept = layer.columns or layer.rows or layer.added_bias or layer.transposed
    if kept or len(layer.terms) != 1 or not isinstance(layer.terms[0], Symmetric):
        raise CheckpointError(
            f"{name} is stored as {layer.describe()}{' of a Conv1D' if layer.transposed else ''}, which "
            "compressed-tensors has no form for; compress with --format compressed-tensors"
        )
    return layer.terms[0]


def _quantization(stored: StoredModel, forms: dict[str, Symmetric]) -> dict[str, Any]:
    """The entry in config.json: one group of layers for each width and group size, by their full names."""
    require_package()
    from compressed_tensors.quantization import (  # type: ignore[import-untyped]
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    groups: dict[str, QuantizationScheme] = {}
    for form in sorted(set(forms.values()), key=lambda form: (form.bits, form.group)):
        weights = QuantizationArgs(
            num_bits=form.bits, type="int", symmetric=True, strategy="group", group_size=form.group,
            dynamic=False,
        )  # fmt: skip
        targets = [name for name, own in forms.items() if own == form]
        groups[f"group_{len(groups)}"] = QuantizationScheme(
            targets=targets, weights=weights, format="pack-quantized"
        )
    manifest = read_manifest(stored.directory)
    dense = [name for name, record in manifest.layers.items() if record.layer is None]
    config = QuantizationConfig(
        config_groups=groups, format="pack-quantized", ignore=[*dense, *manifest.untouched],
        quantization_status=QuantizationStatus.COMPRESSED,
    )  # fmt: skip
    return config.model_dump(mode="json", exclude_none=True)
