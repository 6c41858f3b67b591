"""The source model: loaded, traced and checked, and the bytes that its linear weights may take."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lrsd.data.sources import mixture_identity
from lrsd.errors import BudgetError, InputError
from lrsd.forms.base import Shape
from lrsd.intake.companions import companions
from lrsd.model.alone import require_separable
from lrsd.model.embedding import embedding_names, packed_bytes
from lrsd.model.experts import fusions, unfuse_experts
from lrsd.model.gguf import GgufSource, match_gguf
from lrsd.model.layout import Layout, block_names, find_layout
from lrsd.model.load import LoadedModel, check_finite, fingerprint, load_model, resolve_device
from lrsd.model.types import Model
from lrsd.recipe import Recipe
from lrsd.settings import Budget, Run, parse_size
from lrsd.steps.embeddings import matrices_of
from lrsd.work.onloading import free_memory
from lrsd.work.process import Process, allowed_memory
from lrsd.work.residency import Residence
from lrsd.work.world import World, local_processes

# Of the linear weights, where 8-bit embeddings alone already meet the ratio of the checkpoint.
_LEAST_RATIO = 1.001
# Bytes that this program's metadata take in a GGUF file, and for each of its matrices besides.
_METADATA, _METADATA_PER_MATRIX = 2**14, 2**10


@dataclass(frozen=True)
class SourceModel:
    """A dense model with finite weights, what is to be compressed of it, on what text, within which bytes.

    fingerprint, text: what tells model and text from others. checkpoint_bytes: of all weights, as stored.
    gguf: the file that it came from, where another one is to be made of it; embeddings: what else the budget
    is for then.
    """

    loaded: LoadedModel
    layout: Layout
    residence: Residence
    memory_limit: int | None
    fingerprint: str
    text: str
    budget: int
    checkpoint_bytes: int
    gguf: GgufSource | None = None
    embeddings: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of every matrix that the budget is for."""
        embeddings = {name: Shape(*self._weight(name)) for name in self.embeddings}
        return {name: spec.shape for name, spec in self.layout.linears.items()} | embeddings

    def _weight(self, name: str) -> tuple[int, int]:
        weight = self.loaded.model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        rows, columns = weight.shape
        return rows, columns

    @property
    def linear_bytes(self) -> int:
        """Of the linear weights that are compressed, at 16 bit, and of what else the budget is for."""
        return sum(shape.dense_bytes for shape in self.shapes.values())

    @property
    def linear_ratio(self) -> float:
        """Of the linear weights, whatever the ratio was asked of."""
        return self.linear_bytes / self.budget


def load_source(
    source: str,
    recipe: Recipe,
    memory: int | None = None,
    process: Process | None = None,
    world: World | None = None,
    headed: Callable[[LoadedModel], LoadedModel] = lambda loaded: loaded,
) -> SourceModel:
    """memory: bytes of it allowed, by default this process's share of the machine's; headed: gives a model
    another head. The caller closes `residence`.

    Raises: InputError for a model that cannot be compressed, NumericsError for non-finite weights.
    """
    world = world or World()
    limit = allowed_memory() if memory is None else memory
    if memory is None and limit is not None:
        limit //= local_processes()
    text = mixture_identity(list(recipe.calibration.shares))
    device = resolve_device(recipe.run.device)
    if world.size > 1 and ":" in recipe.run.device:
        raise InputError(
            f"device {recipe.run.device} would be that of all {world.size} processes; leave the number out, "
            "each takes the one of its local rank"
        )
    # Read to the host whatever the device: it need not hold all of them.
    loaded = load_model(source, dtype=recipe.run.dtype, device="cpu", memory=limit)
    if loaded.directory is not None:
        list(companions(loaded.directory))  # what cannot be kept is better known now
    if getattr(loaded.model, "is_quantized", False):
        raise InputError(f"{source} is already compressed; compress the dense model it was made from")
    loaded = headed(loaded)
    loaded.model.requires_grad_(False)  # derivatives are taken by outputs of layers, never by weights
    unfuse_experts(loaded.model)
    residence = Residence(loaded.model, limit, process)
    if device.type != "cpu":
        residence.onload(block_names(loaded.model), device, device_limit(recipe.run, device))
    example = loaded.kind.example(loaded.model)
    layout = find_layout(loaded.model, example, recipe.selection)
    if recipe.method.weighs_tokens:
        layout = layout.one_by_one()
    for name, weight in residence.passing() if world.leads else ():
        check_finite(name, weight)
    require_separable(loaded.model, layout, example)
    identity = world.tell(fingerprint(loaded, residence.passing()) if world.leads else "")
    linear, whole = (
        sum(spec.shape.dense_bytes for spec in layout.linears.values()),
        checkpoint_bytes(loaded.model),
    )
    if recipe.run.format == "gguf":
        file, embeddings = _gguf_source(source, loaded.model, layout, recipe.budget)
        budget = gguf_budget(file, linear, whole, recipe.budget)
        return SourceModel(loaded, layout, residence, limit, identity, text, budget, whole, file, embeddings)
    budget = linear_budget(loaded.model, linear, recipe.budget)
    return SourceModel(loaded, layout, residence, limit, identity, text, budget, whole)


def device_limit(run: Run, device: torch.device) -> int | None:
    """Bytes of an accelerator that may be taken; None: as many as there are."""
    return free_memory(device) if run.device_memory is None else parse_size(run.device_memory)


def _gguf_source(
    source: str, model: Model, layout: Layout, asked: Budget
) -> tuple[GgufSource, tuple[str, ...]]:
    """The file, and embedding and head where they share the budget. Raises: InputError."""
    if not source.endswith(".gguf"):
        raise InputError(
            f"format gguf is made of a GGUF file, got {source}; convert it with llama.cpp's "
            "convert_hf_to_gguf.py --outtype bf16 first"
        )
    if fused := list(fusions(model)):
        raise InputError(f"{fused[0]} has experts in fused tensors, which are not written to GGUF yet")
    names = matrices_of(model, embedding_names(model)) if asked.scope == "checkpoint" else ()
    return match_gguf(Path(source), model, (*layout.linears, *names)), names


def gguf_budget(file: GgufSource, linear: int, whole: int, asked: Budget) -> int:
    """Bytes that the file's matrices may take. linear, whole: of the linear weights and of all, dense.

    Raises: BudgetError if what else is in the file leaves nothing for them.
    """
    if asked.scope == "linear":
        return int(linear / asked.ratio)
    rest = file.rest + _METADATA + _METADATA_PER_MATRIX * len(file.tensors)
    if (budget := asked.whole(whole) - rest) <= 0:
        raise BudgetError(
            f"{asked.whole(whole):,} bytes were asked for, but tokenizer, norms and metadata alone take "
            f"{rest:,}; ask for a larger file"
        )
    return budget


def linear_budget(model: Model, linear: int, asked: Budget) -> int:
    """Bytes that the linear weights may take, `linear` being what they take at 16 bit.

    Raises: BudgetError if what else is in the checkpoint leaves nothing for them.
    """
    if asked.scope == "linear":
        return int(linear / asked.ratio)
    whole = checkpoint_bytes(model)
    dense, packed = packed_bytes(model, embedding_names(model))
    rest = whole - linear - dense + packed
    budget = asked.whole(whole) - rest
    if budget <= 0:
        raise BudgetError(
            f"ratio {whole / asked.whole(whole):.4g}x leaves {asked.whole(whole):,} bytes for the "
            f"checkpoint, but embeddings at 8 bit and norms alone take {rest:,}; try a ratio below "
            f"{whole / rest:.3g}x"
        )
    return min(budget, int(linear / _LEAST_RATIO))


def checkpoint_bytes(model: Model) -> int:
    """Bytes of all weights in the types that they are stored in, tied ones once."""
    stored = model.state_dict().keys()
    buffers = sum(buffer.nbytes for name, buffer in model.named_buffers() if name in stored)
    return buffers + sum(parameter.nbytes for parameter in model.parameters())
