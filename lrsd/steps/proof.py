"""A written result, before it appears under its name: read back, and run as a user will run it."""

from pathlib import Path

import torch
from torch import Tensor, nn

from lrsd.checkpoint.reader import stored_bytes, written_tensors
from lrsd.errors import CheckpointError, LrsdError
from lrsd.forms.packed import PackedLinear
from lrsd.model.load import check_finite, load_model
from lrsd.model.samples import Samples, logits_of, run_model
from lrsd.model.types import Model
from lrsd.steps.source import SourceModel
from lrsd.work.onloading import compute_device
from lrsd.work.process import current_rss, release_freed

# Of the first calibration sample.
_TOKENS = 64
# Bytes beside those of the process that loading a result takes at most, and for each of its own: codes are
# opened, and what that took is returned to the system later.
_LOADING, _LOADED = 2**30, 4
# Squared error of the logits, relative to theirs, that another order of adding makes, or 16-bit values of the
# same integers in an engine's format.
_TOLERANCE = 1e-3


@torch.inference_mode()
def require_usable(source: SourceModel, samples: Samples, written: Path) -> str | None:
    """Whether the result, loaded like any other, has the logits of the model in memory; and whether tensors
    of the same name and shape in the files and there are the same to the byte (in lrsd's own format, all).
    The source's weights are given up for that.

    source: the model in memory, compressed. written: in lrsd's format, or one that other programs read.
    Returns: why it was not run, where it was not. Raises: CheckpointError.
    """
    model, device = source.loaded.model, compute_device(source.loaded.model)
    _require_same_tensors(dict(model.state_dict()), written)
    size = written.stat().st_size if written.is_file() else stored_bytes(written)
    needed = current_rss() + _LOADING + _LOADED * size
    limit = source.memory_limit
    if source.residence.paged or (limit is not None and needed > limit):
        return f"the result was read back, but not run: that may take {needed / 1e9:.2f} GB of memory"
    if (onloading := source.residence.onloading) is not None:
        source.residence.close()  # packed layers decode themselves where they are
        if onloading.limit is not None and _LOADED * size > onloading.limit:
            device = torch.device("cpu")
        nn.Module.to(model, device)
    sample = samples[:1].cut(_TOKENS)
    expected = logits_of(run_model(model, sample)).cpu()
    check_finite("the compressed model's output", expected)
    _give_up(model)
    try:
        loaded = load_model(str(written), dtype=str(model.dtype).removeprefix("torch."), device=str(device))
        found = logits_of(run_model(loaded.model, sample)).cpu()
    except LrsdError as error:
        raise CheckpointError(f"the result cannot be loaded, nothing was written: {error}") from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models raise errors of every kind
        raise CheckpointError(
            f"the result cannot be run, nothing was written: {type(error).__name__}: {error}"
        ) from error
    deviation = (found - expected).square().sum() / expected.square().sum().clamp(min=1e-30)
    if not deviation <= _TOLERANCE:
        raise CheckpointError(
            "the result, loaded again, has other logits than the model that was compressed (relative squared "
            f"error {float(deviation):.1e}); nothing was written"
        )
    return None


def _give_up(model: Model) -> None:
    """Free a model's weights, and what packed layers made of theirs."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.forget()
    model.to_empty(device="meta")
    release_freed()


def _require_same_tensors(state: dict[str, Tensor], written: Path) -> None:
    """Raises: CheckpointError for a stored tensor that is not the one in memory."""
    for name, stored in written_tensors(written):
        kept = state.get(name)
        if kept is not None and kept.shape == stored.shape and not _same_bytes(kept.cpu(), stored):
            raise CheckpointError(
                f"{name} is not as it was written: disk or memory is failing; nothing was written"
            )


def _same_bytes(kept: Tensor, stored: Tensor) -> bool:
    return kept.dtype == stored.dtype and torch.equal(
        kept.contiguous().view(torch.uint8), stored.view(torch.uint8)
    )
