"""transformers' Trainer, as training for compression needs it: distillation, pruning at every step, and
checkpoints that a journal knows of. One CPU, one accelerator or many is Trainer's (accelerate's) business.
"""

import importlib.util
import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lrsd.errors import CheckpointError, InputError, NumericsError
from lrsd.methods.losparse import Losparse
from lrsd.model.load import errors_only
from lrsd.model.types import Model
from lrsd.progress import Progress
from lrsd.steps.prepare import TRAIN_STEP
from lrsd.training.pruning import LowRankPlusSparse, Phases, Pruning
from lrsd.training.tasks import IGNORED, Item, collate
from lrsd.work.files import sync
from lrsd.work.journal import Workspace

# A checkpoint after each such share of the steps: weights and the optimizer's two moments, 12 bytes per
# parameter.
_CHECKPOINTS = 1 / 10
# Their directories, which are Trainer's.
_DIRECTORY = "checkpoint-"
# Largest norm of the gradient, Trainer's own default and the paper's.
_GRADIENT_NORM = 1.0


def require_accelerate() -> None:
    """Raises: InputError if what Trainer needs is not installed."""
    if importlib.util.find_spec("accelerate") is None:
        raise InputError("--method losparse trains, which needs accelerate: pip install 'lrsd[train]'")


def train_model(
    model: Model,
    items: Sequence[Item],
    method: Losparse,
    directory: Path,
    *,
    seed: int,
    padding: int,
    device: torch.device,
    pruning: Pruning | None = None,
    teacher: Model | None = None,
    journal: Workspace | None = None,
    progress: Progress | None = None,
) -> None:
    """Train all parameters of `model`, in place, by AdamW on the items in an order drawn from `seed`.

    Args: directory: of checkpoints; padding: the token that items are padded with; pruning: done at every
        step; teacher: the model to distill from; journal: knows finished checkpoints, the last of which this
        goes on with, to the same result.
    Raises: NumericsError for a loss that is not finite, InputError if no gradient reaches any layer.
    """
    model.requires_grad_(True)
    callbacks: list[TrainerCallback] = [_Steps(progress or Progress())]
    if pruning is not None:
        callbacks.append(_Prunes(pruning))
    if journal is not None:
        callbacks.append(_Saves(journal))
    with _own_randomness(), errors_only():
        args = _arguments(method, directory, seed, device, keeps=journal is not None, clips=pruning is None)
        _require_all(args, journal)
        trainer = _Trainer(
            model=_Student(model),
            args=args,
            train_dataset=_Items(items),
            data_collator=partial(collate, padding=padding),
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.model_accepts_loss_kwargs = False  # the loss of a batch is its mean
        trainer.method, trainer.teacher = method, teacher
        last = None if journal is None else last_checkpoint(journal, directory)
        with torch.enable_grad():
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
    model.eval().requires_grad_(False)
    nn.Module.to(model, "cpu")


def last_checkpoint(steps: Workspace, directory: Path) -> Path | None:
    """The last one that was finished and is still there."""
    found = [path for path in directory.glob(f"{_DIRECTORY}*") if _step(path) in steps]
    return max(found, key=lambda path: int(path.name.removeprefix(_DIRECTORY)), default=None)


def distillation(method: Losparse, student: Any, teacher: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """alpha_out T^2 KL(teacher || student) at temperature T, mean over what has a label, plus alpha_layer
    times the sum over layers of the mean squared distance of hidden states."""
    loss = student.logits.new_zeros(())
    if method.distill_output:
        loss = loss + method.distill_output * _divergence(
            student.logits, teacher.logits, inputs["labels"], method.temperature
        )
    if method.distill_layers:
        # Of padding they say nothing; a decoder's goes by its labels.
        masks = {
            "hidden_states": inputs.get("attention_mask"),
            "encoder_hidden_states": inputs.get("attention_mask"),
        }
        if "decoder_hidden_states" in student:
            masks["decoder_hidden_states"] = inputs["labels"] != IGNORED
        pairs = [
            _distance(mine, other, mask)
            for name, mask in masks.items()
            for mine, other in zip(student.get(name) or (), teacher.get(name) or (), strict=True)
        ]
        loss = loss + method.distill_layers * torch.stack(pairs).sum()
    return loss


def _divergence(mine: Tensor, other: Tensor, labels: Tensor, temperature: float) -> Tensor:
    if labels.shape == mine.shape[:-1]:
        mine, other = mine[labels != IGNORED], other[labels != IGNORED]
    logits, target = log_softmax(mine.float() / temperature, -1), log_softmax(other.float() / temperature, -1)
    return temperature**2 * kl_div(logits, target, reduction="batchmean", log_target=True)


def _distance(mine: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
    squares = (mine - other.to(mine)).square().mean(-1)
    return squares.mean() if mask is None else squares[mask.bool()].mean()


class _Student(nn.Module):
    """A model under the names that its state has in memory, tied weights once: `save_pretrained` would take
    modules that are not transformers' for those that they replace."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model  # and not its configuration, in which Trainer would switch off the cache
        self._takes_cache = "use_cache" in inspect.signature(model.forward).parameters

    def forward(self, **inputs: Any) -> Any:
        if self._takes_cache:
            inputs["use_cache"] = False
        return self.model(**inputs)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        state = super().state_dict(*args, **options)
        seen: set[tuple[int, torch.Size]] = set()
        alone: dict[str, Any] = {}
        for name, tensor in state.items():
            place = (tensor.data_ptr(), tensor.shape)
            if tensor.numel() == 0 or place not in seen:
                alone[name] = tensor.contiguous()  # as files hold them
                seen.add(place)
        return alone

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Raises: CheckpointError for a state that is not this model's."""
        expected = self.state_dict().keys()
        if differing := sorted(expected ^ state.keys()):
            raise CheckpointError(
                f"a checkpoint of the training has other tensors, {differing[0]} among them"
            )
        return super().load_state_dict(state, strict=False, assign=assign)


class _Trainer(Trainer):
    method: Losparse
    teacher: Model | None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        more = (
            {"output_hidden_states": True} if self.teacher is not None and self.method.distill_layers else {}
        )
        outputs = model(**inputs, **more)
        loss = outputs.loss
        if self.teacher is not None:
            with torch.no_grad():
                taught = nn.Module.to(self.teacher, loss.device)(**inputs, **more)
            loss = loss + distillation(self.method, outputs, taught, inputs)
        if not bool(torch.isfinite(loss)):
            raise NumericsError(
                f"the loss is {float(loss.detach())} at step {self.state.global_step + 1}; lower "
                "--learning-rate, or look for items without a token to learn from"
            )
        return (loss, outputs) if return_outputs else loss


class _Steps(TrainerCallback):
    """Tells how far the training is."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.stage("train", state.max_steps - state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.step(f"step {state.global_step}")


class _Prunes(TrainerCallback):
    """Importance before every optimizer step, from the gradients as they are; then these are clipped, which
    would weigh some steps less than others; rows after the step."""

    def __init__(self, pruning: Pruning) -> None:
        self.pruning = pruning
        self.phases: Phases

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.phases = Phases.of(self.pruning.method, state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 0 and not any(map(_has_gradient, self.pruning.layers.values())):
            raise InputError(
                "no gradient reaches any of the layers that are to be compressed; the model cannot be "
                "trained on this task: try another --task"
            )
        self.pruning.before_step()
        nn.utils.clip_grad_norm_(more["model"].parameters(), _GRADIENT_NORM)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.pruning.after_step(state.global_step + 1, self.phases)


class _Saves(TrainerCallback):
    """A checkpoint counts once the journal has it: all of its files are there by then."""

    def __init__(self, journal: Workspace) -> None:
        self.journal = journal

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if (step := f"{TRAIN_STEP}{state.global_step}") not in self.journal:
            if self.journal.world.leads:
                place = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                for path in (*place.rglob("*"), place, place.parent):
                    sync(path)
            self.journal.finish(step)


class _Items(Dataset):
    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]


def _require_all(args: TrainingArguments, journal: Workspace | None) -> None:
    """Several processes train as one, and one on one device: Trainer would spread a batch over all that it
    sees, its loss then being one per device.

    Raises: InputError if Trainer takes each process for one alone.
    """
    if journal is not None and args.world_size != journal.world.size:
        raise InputError(
            f"{journal.world.size} processes were started, of which Trainer knows {args.world_size}; set "
            "LOCAL_RANK in the batch script, or start them with torchrun"
        )
    if args.n_gpu > 1:
        args._n_gpu = 1


def _arguments(
    method: Losparse, directory: Path, seed: int, device: torch.device, *, keeps: bool, clips: bool
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=method.train_batch,
        num_train_epochs=method.epochs,
        max_steps=method.train_steps or -1,
        learning_rate=method.learning_rate,
        max_grad_norm=_GRADIENT_NORM if clips else 0.0,
        lr_scheduler_type="linear",
        seed=seed % 2**32,  # NumPy takes no more
        data_seed=seed % 2**32,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        remove_unused_columns=False,
        save_strategy="steps" if keeps else "no",
        save_steps=_CHECKPOINTS,
        save_total_limit=2,  # the last one may not be whole
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )


def _has_gradient(layer: LowRankPlusSparse) -> bool:
    found = (layer.U, layer.V, layer.S)
    return any(part is not None and part.grad is not None and bool(part.grad.any()) for part in found)


def _step(checkpoint: Path) -> str:
    return TRAIN_STEP + checkpoint.name.removeprefix(_DIRECTORY)


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Trainer seeds the generators that all of a process share; here they are as before afterwards."""
    python, own = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(own)
