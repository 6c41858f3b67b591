"""What is to be compressed, and within which bytes."""

from dataclasses import dataclass

from lrsd.data.sources import require_text, text_identity
from lrsd.errors import BudgetError, InputError
from lrsd.model.embedding import embedding_names, packed_bytes
from lrsd.model.experts import unfuse_experts
from lrsd.model.layout import Layout, find_layout
from lrsd.model.load import LoadedModel, check_finite, fingerprint, load_model
from lrsd.model.types import Model
from lrsd.numerics.allocate import VALUE_BYTES
from lrsd.settings import CalibrationSettings, CompressionSettings
from lrsd.work.process import allowed_memory
from lrsd.work.residency import Residence

# Of the linear weights, where 8-bit embeddings alone already meet the ratio of the checkpoint.
_LEAST_RATIO = 1.001


@dataclass(frozen=True)
class Subject:
    """A dense model with finite weights, what is to be compressed of it, on what text, within which bytes.

    fingerprint, text: what tells model and text from others.
    """

    loaded: LoadedModel
    layout: Layout
    residence: Residence
    memory_limit: int | None
    fingerprint: str
    text: str
    budget: int


def load_subject(
    source: str, settings: CompressionSettings, calibration: CalibrationSettings, memory: int | None = None
) -> Subject:
    """memory: bytes of it allowed, all of the machine's by default.

    Raises: InputError for a model that cannot be compressed, NumericsError for non-finite weights.
    """
    limit = allowed_memory() if memory is None else memory
    require_text(calibration.source, "--calib", features=calibration.source.endswith(".safetensors"))
    loaded = load_model(source, dtype=settings.dtype, device=settings.device, memory=limit)
    if getattr(loaded.model, "is_quantized", False):
        raise InputError(f"{source} is already compressed; compress the dense model it was made from")
    unfuse_experts(loaded.model)
    residence = Residence(loaded.model, limit)
    layout = find_layout(loaded.model, loaded.kind.example(loaded.model), settings.selection)
    for name, weight in residence.passing():
        check_finite(name, weight)
    identity = fingerprint(loaded, residence.passing())
    linear = sum(spec.shape.dense_bytes for spec in layout.linears.values())
    budget = linear_budget(loaded.model, linear, settings)
    text = text_identity(calibration.source)
    return Subject(loaded, layout, residence, limit, identity, text, budget)


def linear_budget(model: Model, linear: int, settings: CompressionSettings) -> int:
    """Bytes that the linear weights may take, `linear` being what they take at 16 bit.

    Raises: BudgetError if what else is in the checkpoint leaves nothing for them.
    """
    if settings.scope == "linear":
        return int(linear / settings.ratio)
    whole = checkpoint_bytes(model)
    dense, packed = packed_bytes(model, embedding_names(model))
    rest = whole - linear - dense + packed
    budget = int(whole / settings.ratio) - rest
    if budget <= 0:
        raise BudgetError(
            f"ratio {settings.ratio:.4g}x leaves {int(whole / settings.ratio):,} bytes for the checkpoint, "
            f"but embeddings at 8 bit and norms alone take {rest:,}; try a ratio below {whole / rest:.3g}x"
        )
    return min(budget, int(linear / _LEAST_RATIO))


def checkpoint_bytes(model: Model) -> int:
    """Bytes of all weights at 16 bit, tied ones once."""
    return sum(VALUE_BYTES * parameter.numel() for parameter in model.parameters())
