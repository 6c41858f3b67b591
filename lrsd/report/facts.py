"""What the report says of a result, as numbers: where its bytes are, and what every layer lost.

All of it is read from a manifest, which may be anybody's: numbers are checked, names are only carried.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from lrsd.checkpoint.manifest import LayerRecord, Manifest
from lrsd.errors import CheckpointError
from lrsd.forms.base import Form, Shape
from lrsd.forms.blocks import Blocks
from lrsd.forms.coded_low_rank import CodedLowRank
from lrsd.forms.layer import Layer, parse_layer
from lrsd.forms.lowrank import LowRank
from lrsd.forms.masked import Masked
from lrsd.forms.semi_structured import SemiStructured

# Errors and sensitivities beyond these are none of any model.
_SMALLEST, _LARGEST = 1e-15, 1e9
# Of a layer's name: where its block is, the block's number, and what it is within the block.
_IN_BLOCK = re.compile(r"(.*?)\.(\d{1,6})\.(.+)", re.DOTALL)
_NUMBER = re.compile(r"\.\d+(?=\.|$)")
# What the bytes of a layer are.
LOW_RANK, CHANNELS, ENTRIES = "low rank", "kept channels", "kept entries"
CODES, SCALES, BIAS, DENSE, STORED = "integer codes", "scales and steps", "bias", "dense at 16 bit", "stored"
PARTS = (LOW_RANK, CHANNELS, ENTRIES, CODES, SCALES, BIAS, DENSE, STORED)


@dataclass(frozen=True)
class LayerFacts:
    """One linear weight. kind: what it is within its block, the numbers of experts left out; block: None
    outside of the blocks; parts: bytes by what they are; rank: of L; kept: share of the weights that S has
    at 16 bit; loss: what it adds to the loss of the whole."""

    name: str
    kind: str
    block: int | None
    record: LayerRecord
    parts: Mapping[str, int]
    rank: int
    kept: float
    loss: float

    @property
    def weights(self) -> int:
        return self.record.out_features * self.record.in_features

    @property
    def bits(self) -> float:
        return 8 * self.record.bytes / self.weights

    @property
    def rank_share(self) -> float:
        return self.rank / min(self.record.out_features, self.record.in_features)


@dataclass(frozen=True)
class Facts:
    """measured: whether sensitivities were, so that losses are nats of KL per token; else they are relative
    errors. total: bytes of all weights as stored."""

    layers: tuple[LayerFacts, ...]
    total: int
    measured: bool

    @cached_property
    def kinds(self) -> list[str]:
        """In the order of the model."""
        return list(dict.fromkeys(layer.kind for layer in self.layers))

    @cached_property
    def cells(self) -> dict[tuple[str, int], list[LayerFacts]]:
        """Layers by kind and block: several where these are experts."""
        found: dict[tuple[str, int], list[LayerFacts]] = {}
        for layer in self.layers:
            if layer.block is not None:
                found.setdefault((layer.kind, layer.block), []).append(layer)
        return found

    @cached_property
    def parts(self) -> dict[str, int]:
        """Bytes of all layers by what they are; together they are what all layers take."""
        sums = {part: sum(layer.parts.get(part, 0) for layer in self.layers) for part in PARTS}
        return {part: count for part, count in sums.items() if count}

    @property
    def linear(self) -> int:
        return sum(layer.record.bytes for layer in self.layers)

    @property
    def rest(self) -> int:
        """Bytes of what is no layer of these: embeddings, head and norms, as a rule."""
        return max(0, self.total - self.linear)

    @cached_property
    def worst(self) -> list[LayerFacts]:
        """By what they add to the loss; ties in the order of the model."""
        return sorted(self.layers, key=lambda layer: -layer.loss)

    @property
    def loss(self) -> float:
        return sum(layer.loss for layer in self.layers)


def facts_of(manifest: Manifest, total: int) -> Facts:
    """total: bytes of all weights as stored. Raises: CheckpointError for impossible numbers."""
    measured = manifest.expected_kl is not None
    kinds = _kinds(manifest.layers)
    layers = tuple(
        _layer(name, kind, block, manifest.layers[name], measured) for name, (kind, block) in kinds.items()
    )
    return Facts(layers, total, measured)


def _layer(name: str, kind: str, block: int | None, record: LayerRecord, measured: bool) -> LayerFacts:
    sizes = (record.out_features, record.in_features, record.bytes, record.dense_bytes)
    # A weight that is stored has a size, and numbers of 64 bits are no sizes.
    if min(sizes[:2]) < 1 or sizes[2] < 0 or sizes[3] < 1 or max(sizes) > 2**48:
        raise CheckpointError(
            f"layer {name!r:.200} has {record.out_features} x {record.in_features} weights in {record.bytes} "
            f"bytes, dense {record.dense_bytes}; the manifest is damaged"
        )
    layer = None if record.layer is None else parse_layer(name, record.layer)
    shape = Shape(record.out_features, record.in_features)
    error = finite(record.error)
    return LayerFacts(
        name, kind, block, record,
        parts=_parts(layer, shape, record.bytes),
        rank=0 if layer is None else sum(_rank(term) for term in layer.terms),
        kept=0.0 if layer is None else min(1.0, _kept(layer, shape)),
        loss=error * finite(record.sensitivity) if measured else error,
    )  # fmt: skip


def finite(value: float) -> float:
    """What a manifest may have and no picture can show, as 0, or as the largest that one can."""
    return min(value, _LARGEST) if math.isfinite(value) and value > _SMALLEST else 0.0


def _rank(term: Form) -> int:
    return term.rank if isinstance(term, LowRank | CodedLowRank) else 0


def _kept(layer: Layer, shape: Shape) -> float:
    """Share of the weights that are stored at 16 bit one by one, in channels or as entries."""
    kept = layer.columns * shape.out_features + layer.rows * shape.in_features
    for term in layer.terms:
        if isinstance(term, Masked):
            kept += term.entries
        elif isinstance(term, Blocks):
            kept += term.blocks * term.size**2
        elif isinstance(term, SemiStructured):
            kept += shape.out_features * shape.in_features // 2
    return kept / (shape.out_features * shape.in_features)


def _parts(layer: Layer | None, shape: Shape, nbytes: int) -> dict[str, int]:
    """Bytes by what they are, from what the form says that it stores; all of one part where that does not
    come to `nbytes`."""
    if layer is None:
        return {DENSE: nbytes}
    found: dict[str, int] = {}
    try:
        specs = layer.tensors(shape) if layer.fits(shape) else {}
    except ValueError:  # two terms that store the same
        specs = {}
    owners = {name: term for term in layer.terms for name in specs and term.tensors(layer.free(shape))}
    for name, spec in specs.items():
        if name == "bias" and not layer.added_bias:
            continue  # the model's own, on neither side of the ratio
        part = _part(name, owners.get(name))
        found[part] = found.get(part, 0) + int(spec.nbytes)
    return found if sum(found.values()) == nbytes else {STORED: nbytes}


def _part(name: str, owner: Form | None) -> str:
    if name == "bias":
        return BIAS
    if owner is None:
        return LOW_RANK if name in ("weight", "coefficients") else CHANNELS
    if isinstance(owner, LowRank | CodedLowRank):
        return LOW_RANK
    if isinstance(owner, Masked | Blocks | SemiStructured):
        return ENTRIES
    return CODES if name in ("codes", "weight_packed", "blocks") else SCALES


def _kinds(names: Iterable[str]) -> dict[str, tuple[str, int | None]]:
    """What every layer is called within its block, as short as it is unmistakable, and the block's number."""
    found: dict[str, tuple[str, str, int | None]] = {}
    for name in names:
        match = _IN_BLOCK.fullmatch(name)
        place, block, rest = (match[1], int(match[2]), match[3]) if match else ("", None, name)
        # Numbers further on are those of experts, or of sublayers whose names differ besides.
        found[name] = place, _NUMBER.sub(".*", rest), block
    stacks = dict.fromkeys(place for place, _, block in found.values() if block is not None)
    short: dict[tuple[str, str], str] = {}
    for stack in ["", *stacks]:
        own = dict.fromkeys(rest for place, rest, _ in found.values() if place == stack)
        named = f"{_told_apart(stack, stacks)} " if len(stacks) > 1 and stack else ""
        short |= {(stack, rest): named + label for rest, label in _shortest(own).items()}
    return {name: (short[place, rest], block) for name, (place, rest, block) in found.items()}


def _told_apart(stack: str, stacks: Iterable[str]) -> str:
    """The first part of a name that no other stack has."""
    others = {part for other in stacks if other != stack for part in other.split(".")}
    return next((part for part in stack.split(".") if part not in others), stack)


def _shortest(names: Iterable[str]) -> dict[str, str]:
    """Each by its last parts, as many as it takes for no other to end alike."""
    endings = {name: _endings(name) for name in names}
    count = Counter(ending for own in endings.values() for ending in own)
    return {
        name: next((e for e in own if count[e] == 1 and not e.startswith("*")), name)
        for name, own in endings.items()
    }


def _endings(name: str) -> list[str]:
    """Its last parts, one more in each; a dozen at most, which no model's names have."""
    parts = name.rsplit(".", 12)
    return [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
