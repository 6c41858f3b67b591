"""The source model: loaded, traced and checked, and the bytes that its linear weights may take."""

from dataclasses import dataclass

from lrsd.data.sources import mixture_identity
from lrsd.errors import BudgetError, InputError
from lrsd.forms.base import VALUE_BYTES
from lrsd.model.embedding import embedding_names, packed_bytes
from lrsd.model.experts import unfuse_experts
from lrsd.model.layout import Layout, find_layout
from lrsd.model.load import LoadedModel, check_finite, fingerprint, load_model
from lrsd.model.types import Model
from lrsd.recipe import Recipe
from lrsd.settings import Budget
from lrsd.work.process import Process, allowed_memory
from lrsd.work.residency import Residence

# Of the linear weights, where 8-bit embeddings alone already meet the ratio of the checkpoint.
_LEAST_RATIO = 1.001


@dataclass(frozen=True)
class SourceModel:
    """A dense model with finite weights, what is to be compressed of it, on what text, within which bytes.

    fingerprint, text: what tells model and text from others. checkpoint_bytes: of all weights, at 16 bit.
    """

    loaded: LoadedModel
    layout: Layout
    residence: Residence
    memory_limit: int | None
    fingerprint: str
    text: str
    budget: int
    checkpoint_bytes: int

    @property
    def linear_bytes(self) -> int:
        """Of the linear weights that are compressed, at 16 bit."""
        return sum(spec.shape.dense_bytes for spec in self.layout.linears.values())

    @property
    def linear_ratio(self) -> float:
        """Of the linear weights, whatever the ratio was asked of."""
        return self.linear_bytes / self.budget


def load_source(
    source: str, recipe: Recipe, memory: int | None = None, process: Process | None = None
) -> SourceModel:
    """memory: bytes of it allowed, all of the machine's by default. The caller closes `residence`.

    Raises: InputError for a model that cannot be compressed, NumericsError for non-finite weights.
    """
    limit = allowed_memory() if memory is None else memory
    text = mixture_identity(list(recipe.calibration.shares))
    loaded = load_model(source, dtype=recipe.run.dtype, device=recipe.run.device, memory=limit)
    if getattr(loaded.model, "is_quantized", False):
        raise InputError(f"{source} is already compressed; compress the dense model it was made from")
    loaded.model.requires_grad_(False)  # derivatives are taken by outputs of layers, never by weights
    unfuse_experts(loaded.model)
    residence = Residence(loaded.model, limit, process)
    layout = find_layout(loaded.model, loaded.kind.example(loaded.model), recipe.selection)
    if recipe.method.weighs_tokens:
        layout = layout.one_by_one()
    for name, weight in residence.passing():
        check_finite(name, weight)
    identity = fingerprint(loaded, residence.passing())
    linear = sum(spec.shape.dense_bytes for spec in layout.linears.values())
    budget = linear_budget(loaded.model, linear, recipe.budget)
    return SourceModel(
        loaded, layout, residence, limit, identity, text, budget, checkpoint_bytes(loaded.model)
    )


def linear_budget(model: Model, linear: int, asked: Budget) -> int:
    """Bytes that the linear weights may take, `linear` being what they take at 16 bit.

    Raises: BudgetError if what else is in the checkpoint leaves nothing for them.
    """
    if asked.scope == "linear":
        return int(linear / asked.ratio)
    whole = checkpoint_bytes(model)
    dense, packed = packed_bytes(model, embedding_names(model))
    rest = whole - linear - dense + packed
    budget = int(whole / asked.ratio) - rest
    if budget <= 0:
        raise BudgetError(
            f"ratio {asked.ratio:.4g}x leaves {int(whole / asked.ratio):,} bytes for the checkpoint, "
            f"but embeddings at 8 bit and norms alone take {rest:,}; try a ratio below {whole / rest:.3g}x"
        )
    return min(budget, int(linear / _LEAST_RATIO))


def checkpoint_bytes(model: Model) -> int:
    """Bytes of all weights at 16 bit, tied ones once."""
    return sum(VALUE_BYTES * parameter.numel() for parameter in model.parameters())
