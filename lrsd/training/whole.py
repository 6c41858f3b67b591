"""Recovery end to end: all continuous tensors of a compressed model at once, by the divergence of its logits
from the dense model's.

Source: Hinton et al., "Distilling the knowledge in a neural network", 2015; at temperature 1, without labels.
"""

from contextlib import ExitStack

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from lrsd.errors import InputError
from lrsd.model.load import LoadedModel
from lrsd.model.samples import Samples, is_categorical, logits_of, run_model
from lrsd.model.types import Model
from lrsd.progress import Progress
from lrsd.training.descent import Reached, Schedule, arithmetic, descend
from lrsd.training.differentiable import continuous, store, trainable
from lrsd.training.settings import Recovery
from lrsd.work.journal import Workspace
from lrsd.work.onloading import compute_device

# Of the whole model, in the journal; followed by the number of its steps while it is trained.
MODEL_STEP = "recover-model"
# Steps between two states on disk: three numbers for each one that is trained.
EVERY = 50
# Logits of one pass at most, of which half a dozen copies are in memory: 128 MB each.
_LOGITS = 2**25


def require_logits(loaded: LoadedModel) -> int:
    """How many classes the model's logits have. Raises: InputError if it has no logits to compare."""
    logits = logits_of(run_model(loaded.model, loaded.kind.example(loaded.model)))
    if not is_categorical(loaded.model, logits):
        raise InputError(
            f"{type(loaded.model).__name__} has no logits of several classes to compare; use --stage blocks"
        )
    return logits.shape[-1]


def recover_model(
    dense: Model,
    compressed: Model,
    samples: Samples,
    trained: int,
    classes: int,
    settings: Recovery,
    progress: Progress,
    workspace: Workspace,
) -> Reached:
    """Recover all of `compressed`, in place: minimize the mean over positions of KL(dense || compressed).

    Args: trained: how many of the samples are trained on, the others are held out; classes: of the logits.
    Raises: NumericsError if a loss is not finite.
    """
    if MODEL_STEP not in workspace:
        reached = _recovered(dense, compressed, samples, trained, classes, settings, progress, workspace)
        values = reached.values if reached.improved else {}
        workspace.finish(MODEL_STEP, Reached(reached.steps, reached.losses, values))
    reached = workspace.read(MODEL_STEP, Reached)
    store(compressed, reached.values)
    return reached


def _recovered(
    dense: Model,
    compressed: Model,
    samples: Samples,
    trained: int,
    classes: int,
    settings: Recovery,
    progress: Progress,
    workspace: Workspace,
) -> Reached:
    batches, rest = list(samples[:trained].split(settings.batch)), samples[trained:]
    schedule = Schedule(
        batches=len(batches), epochs=settings.model_epochs, rate=settings.model_rate, seed=settings.seed,
        every=EVERY,
    )  # fmt: skip
    at_once = max(1, _LOGITS // (classes * max(1, samples.positions // len(samples))))
    dtypes = {name: compressed.get_parameter(name).dtype for name in continuous(compressed)}
    device = compute_device(compressed)
    kept = [step for step in range(EVERY, schedule.steps, EVERY) if _state_step(step) in workspace]
    start = workspace.read(_state_step(kept[-1]), Reached) if kept else None

    def divergence(part: Samples) -> Tensor:
        with torch.no_grad():
            wanted = logits_of(run_model(dense, part)).to(device)
        with ExitStack() as stack:
            arithmetic(device, stack)
            found = logits_of(run_model(compressed, part))
        return mean_kl(wanted, found)

    def loss(batch: int) -> float:
        total = 0.0
        for part in batches[batch].split(at_once):
            with torch.enable_grad():
                found = divergence(part) * (len(part) / len(batches[batch]))
                found.backward()
            total += float(found.detach())
        return total

    def held_out() -> float:
        return sum(float(divergence(part)) * len(part) for part in rest.split(at_once)) / len(rest)

    def keep(reached: Reached) -> None:
        workspace.finish(_state_step(reached.steps), reached)
        workspace.forget(_state_step(reached.steps - EVERY))

    progress.stage("recover model", schedule.steps - (0 if start is None else start.steps))
    with trainable(compressed) as masters:
        return descend(
            masters, dtypes, schedule, loss=loss, held_out=held_out, what="the model", start=start,
            keep=keep, report=progress.step,
        )  # fmt: skip


def mean_kl(wanted_NC: Tensor, found_NC: Tensor) -> Tensor:
    """Mean over rows of KL(wanted || found) of logits, in nats."""
    first, second = log_softmax(found_NC, -1), log_softmax(wanted_NC, -1)
    return kl_div(first, second, reduction="sum", log_target=True) / len(found_NC)


def _state_step(steps: int) -> str:
    return f"{MODEL_STEP}-{steps:06d}"
