"""`quantization_config` of config.json: the form of every packed layer by module name, embedding and head
where these are in 8 bit, and modules of experts that were taken apart."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lrsd.errors import CheckpointError
from lrsd.forms.layer import Layer, parse_layer

FORMAT_VERSION = 2
# Version 1 had flat entries of layers, see `forms.layer`.
_READABLE = (1, FORMAT_VERSION)
_FUSION = ("gated", "transposed")


@dataclass(frozen=True)
class Packing:
    """layers: by module name; embeddings: modules in 8 bit; experts: how the model has each module of experts
    fused, "gated" and "transposed"."""

    layers: dict[str, Layer]
    embeddings: tuple[str, ...]
    experts: dict[str, dict[str, bool]]


def parse_packing(entry: Any) -> Packing:
    """Raises: CheckpointError for what is not of the documented form, or of an unknown version."""
    check_packing(entry)
    layers = {name: parse_layer(name, value) for name, value in (entry.get("layers") or {}).items()}
    return Packing(layers, tuple(entry.get("embeddings") or ()), entry.get("experts") or {})


def check_packing(entry: Any) -> None:
    """The same but for the layers' entries, which only those need that read layers. Raises:
    CheckpointError."""
    if not isinstance(entry, dict) or entry.get("quant_method") != "lrsd":
        raise CheckpointError(
            "config.json has no quantization_config of lrsd: it is no compressed checkpoint"
        )
    version = entry.get("format_version", 1)
    if version not in _READABLE:
        raise CheckpointError(
            f"checkpoint has format version {version}, this lrsd reads {_READABLE[0]} to {_READABLE[-1]}; "
            "install the lrsd release that wrote it"
        )
    layers, embeddings, experts = (entry.get(key) for key in ("layers", "embeddings", "experts"))
    if not (
        isinstance(layers, dict | None)
        and isinstance(embeddings, list | None)
        and all(isinstance(name, str) for name in embeddings or ())
        and isinstance(experts, dict | None)
        and all(_is_fusion(fusion) for fusion in (experts or {}).values())
    ):
        raise CheckpointError(
            "config.json: quantization_config needs an object of layers, a list of embeddings and an "
            "object of experts"
        )


def packing_entry(
    layers: Mapping[str, dict[str, Any]], embeddings: Iterable[str], experts: Mapping[str, dict[str, bool]]
) -> dict[str, Any]:
    """What config.json says. layers: their own entries."""
    return {
        "quant_method": "lrsd",
        "format_version": FORMAT_VERSION,
        "layers": dict(layers),
        "embeddings": list(embeddings),
        "experts": dict(experts),
    }


def _is_fusion(fusion: Any) -> bool:
    return isinstance(fusion, dict) and all(type(fusion.get(key)) is bool for key in _FUSION)
