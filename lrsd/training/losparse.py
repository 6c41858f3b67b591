"""LoSparse: low rank plus sparse rows, trained on a task; what `--method losparse` does instead of a fit."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from lrsd.data.sources import require_text, text_identity
from lrsd.errors import InputError, SettingsError
from lrsd.methods.losparse import Losparse
from lrsd.model.load import LoadedModel, check_finite, resolve_device
from lrsd.model.samples import Samples
from lrsd.model.slots import weight_slot
from lrsd.model.types import Model
from lrsd.progress import Progress
from lrsd.recipe import Recipe
from lrsd.settings import Calibration
from lrsd.steps.estimate import ResourceEstimate, check_resources
from lrsd.steps.fit import Fitted
from lrsd.steps.observe import Observation
from lrsd.steps.plan import Plan
from lrsd.steps.source import SourceModel, load_source
from lrsd.steps.write import Compressed
from lrsd.training.pruning import LowRankPlusSparse, Pruning, decomposed, ranks_within, stored
from lrsd.training.tasks import padding_token, read_items, sample_of, with_head
from lrsd.training.trainer import require_accelerate, train_model
from lrsd.work.journal import Journal
from lrsd.work.process import Process, current_rss
from lrsd.work.world import World

# Bytes per parameter that training takes besides the parameter: its gradient and AdamW's two moments in
# float32. What activations take depends on the batch.
_TRAINED = 12
# On disk: weights and moments, of two checkpoints and a third that is written.
_KEPT = 3 * 12
# The journal's first step; where Trainer keeps its checkpoints, in the journal's directory.
_ITEMS, _CHECKPOINTS = "items", "training"


def method_of(recipe: Recipe) -> Losparse:
    """The settings of a recipe that trains.

    Raises: SettingsError for settings that say how to calibrate, or for none that say what to train on;
        InputError if what training needs is not installed.
    """
    method = recipe.method
    assert isinstance(method, Losparse)
    if method.train is None:
        raise SettingsError("method losparse trains the model; give a file to train on with --train")
    unused = {
        "calib": recipe.calibration.calib != Calibration().calib,
        "propagate": recipe.calibration.propagate is not None,
        "allocation": recipe.budget.allocation != "auto",
    }
    for name, given in unused.items():
        if given:
            raise SettingsError(
                f"method losparse trains on --train, with one threshold for all layers; leave out --{name}"
            )
    if ":" in recipe.run.device:
        raise SettingsError(
            f"device {recipe.run.device}: training runs on the devices that it sees; say which by "
            "CUDA_VISIBLE_DEVICES"
        )
    require_accelerate()
    return method


def load(
    source: str, recipe: Recipe, memory: int | None, process: Process | None, world: World | None
) -> SourceModel:
    """The source with a head for its task, all of it in the host's memory.

    Raises: see `load_source`; InputError for a training file that cannot be used.
    """
    method = method_of(recipe)
    assert method.train is not None
    require_text(method.train, "--train")
    on_host = replace(recipe, run=replace(recipe.run, device="cpu"))
    headed = partial(_headed, method=method, seed=recipe.calibration.seed)
    found = load_source(source, on_host, memory, process, world, headed)
    found.residence.close()  # weights change from here on: none is read from its file again
    return replace(found, text=text_identity(method.train))


def _headed(loaded: LoadedModel, method: Losparse, seed: int) -> LoadedModel:
    found, is_new = with_head(loaded, method, seed)
    if is_new and method.distill_output:
        raise InputError(
            f"{loaded.source} has no head for this task yet, from whose output could be distilled; leave out "
            "--distill-output, or give a model that was trained on the task"
        )
    return found


def train(
    source: SourceModel, recipe: Recipe, progress: Progress, journal: Journal
) -> tuple[Compressed, Samples]:
    """Train U V + S in the place of every linear layer, rows of S pruned on the way, and put what is stored
    of it into the model.

    Returns: what is to be written, and a sample to try it on. Raises: see `train_model`; BudgetError for
    bytes that hold nothing.
    """
    method, model, seed = method_of(recipe), source.loaded.model, recipe.calibration.seed
    items = read_items(source.loaded, method, recipe.calibration.seqlen)
    device = resolve_device(recipe.run.device)
    journal.claim(processes=journal.world.size)  # each takes its own batch of a step
    journal.begin(device)
    if _ITEMS not in journal:
        journal.finish(_ITEMS)
    teacher = deepcopy(model).float().eval() if method.distills else None
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    nn.Module.float(model)
    dense = {name: model.get_submodule(name) for name in source.layout.linears}
    layers = decompose(model, source, method)
    for module in dense.values():  # of whose weights only the shapes are needed from here on
        assert isinstance(module.weight, Tensor)
        module.weight = nn.Parameter(module.weight.detach().to("meta"), requires_grad=False)
    estimate = _estimate(model)
    check_resources(estimate, journal.directory, source.memory_limit)
    pruning = Pruning(layers, source.budget, method)
    progress.note(
        f"trains {len(layers)} layers on {len(items)} items; low rank takes "
        f"{(source.budget - pruning.left) / source.budget:.1%} of the bytes"
        + f", {pruning.last_fraction:.1%} of those of all rows are kept in the end"
        * pruning.is_sparse
    )
    train_model(
        model, items, method, journal.directory / _CHECKPOINTS,
        seed=seed, padding=padding_token(source.loaded), device=device,
        pruning=pruning, teacher=teacher, journal=journal, progress=progress,
    )  # fmt: skip
    fitted = {}
    for name, layer in layers.items():
        model.set_submodule(name, dense[name])
        slot = weight_slot(model, name)
        fitted[name] = stored(name, layer, types[f"{name}.weight"], transposed=slot.transposed)
        install(model, name, fitted[name])
    _as_before(model, types)
    done = Compressed(source, recipe, _observed(fitted), _plan(fitted), fitted, estimate)
    return done, sample_of(source.loaded, items[0])


def decompose(model: Model, source: SourceModel, method: Losparse) -> dict[str, LowRankPlusSparse]:
    """Put U V + S in the place of every linear layer that is compressed."""
    ranks = ranks_within(source.shapes, source.budget, method.rank_share)
    layers = {}
    for name in source.layout.linears:
        layers[name] = decomposed(weight_slot(model, name), ranks[name], sparse=method.rank_share < 1)
        model.set_submodule(name, layers[name])
    return layers


def install(model: nn.Module, name: str, layer: Fitted) -> None:
    """Put a trained layer in the place of the dense one, as it is stored."""
    slot = weight_slot(model, name)
    layer.install(slot)
    if layer.entry is None and "bias" in layer.tensors:
        slot.module.bias = nn.Parameter(layer.tensors["bias"], requires_grad=False)


def _as_before(model: nn.Module, types: dict[str, torch.dtype]) -> None:
    """Parameters and buffers in the types that they came in. Raises: NumericsError if one is not finite."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in types and tensor.dtype.is_floating_point:
            tensor.data = tensor.data.to(types[name])
            check_finite(name, tensor)


def _estimate(model: nn.Module) -> ResourceEstimate:
    """Of what does not depend on the batch, for a model that is about to be trained."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ResourceEstimate(current_rss() + _TRAINED * parameters, _KEPT * parameters)


def _observed(fitted: dict[str, Fitted]) -> Observation:
    """Nothing was measured but by training."""
    return Observation({}, {}, dict.fromkeys(fitted, 0.0))


def _plan(fitted: dict[str, Fitted]) -> Plan:
    choices = {name: layer.choice for name, layer in fitted.items()}
    return Plan(choices, "one threshold for the rows of all layers", None, propagate=False)
