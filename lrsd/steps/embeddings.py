"""Embedding and head as further layers, for formats that store them like any other matrix."""

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lrsd.forms.base import Shape
from lrsd.forms.layer import parse_layer
from lrsd.methods.base import LayerProblem, Method, State, Status
from lrsd.methods.gguf import Gguf
from lrsd.model.embedding import is_tied
from lrsd.model.load import exact_device
from lrsd.model.replay import Replay
from lrsd.model.samples import Samples, distance, logits_of, run_model
from lrsd.model.types import Model
from lrsd.numerics.menu import Menu
from lrsd.numerics.metric import Metric
from lrsd.numerics.moments import Moments
from lrsd.steps.fit import Fitted, FittedBlock
from lrsd.steps.observe import Observation
from lrsd.steps.plan import Plan
from lrsd.steps.sensitivity import in_float32, probe_samples
from lrsd.work.journal import Workspace
from lrsd.work.onloading import compute_device

OBSERVE_STEP, FIT_STEP = "observe-embeddings", "fit-embeddings"
# Tokens whose states the head's metric is taken of, for each of its columns.
_TOKENS_PER_COLUMN = 8
# Rows solved for at once, and on which offers are measured: a vocabulary is as long as all else.
_ROWS, _OFFERED_ROWS = 2**14, 2**12


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a hook once the head is reached: its product is not wanted."""


@dataclass(frozen=True)
class ObservedEmbeddings:
    """By name: what each offers, how sensitive the output is to it, and its metric G (I, I)."""

    menus: dict[str, Menu]
    sensitivity: dict[str, float]
    grams: dict[str, Tensor]


def matrices_of(model: Model, names: tuple[str, ...]) -> tuple[str, ...]:
    """Of embedding and head those that have a matrix of their own."""
    return names[:1] if len(names) > 1 and is_tied(model) else names


def observe_embeddings(
    replay: Replay,
    samples: Samples,
    names: tuple[str, ...],
    method: Method,
    observation: Observation,
    workspace: Workspace,
) -> Observation:
    """The observation with these matrices among its layers.

    A head is measured by its outputs, tr(E G E^T) with G of what it reads; an embedding by its rows, |E|^2;
    one matrix that is both by the two relative errors in equal shares.
    """
    if not names:
        return observation
    assert isinstance(method, Gguf), "the only one that stores embeddings like other matrices"
    found = workspace.made(OBSERVE_STEP, ObservedEmbeddings, lambda: _observe(replay, samples, names, method))
    return replace(
        observation,
        menus=observation.menus | found.menus,
        sensitivity=observation.sensitivity | found.sensitivity,
    )


def fit_embeddings(
    model: Model, names: tuple[str, ...], method: Method, plan: Plan, workspace: Workspace
) -> dict[str, Fitted]:
    """Every matrix at its planned offer, put into the model."""
    if not names:
        return {}
    grams = workspace.read(OBSERVE_STEP, ObservedEmbeddings).grams

    def fit() -> FittedBlock:
        return FittedBlock({name: _fit(model, name, grams[name], method, plan) for name in names})

    fitted = workspace.made(FIT_STEP, FittedBlock, fit).layers
    for name, layer in fitted.items():
        if layer.entry is not None:
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            (form,) = parse_layer(name, layer.entry).terms
            weight.detach().copy_(
                form.dense(form.load(layer.tensors, Shape(*weight.shape)), Shape(*weight.shape))
            )
    return fitted


def _observe(replay: Replay, samples: Samples, names: tuple[str, ...], method: Gguf) -> ObservedEmbeddings:
    model = replay.model
    menus, sensitivity, grams = {}, {}, {}
    for name in names:
        W_VI = _matrix(model, name)
        gram_II = _metric_of(model, name, samples, W_VI)
        metric = Metric(gram_II, damps_by_channel=True)
        rows_RI = W_VI[:: -(-len(W_VI) // _OFFERED_ROWS)].float()
        menu = method.offer(LayerProblem(rows_RI, metric, model.dtype, 0.0))
        menus[name] = method.priced(menu, Shape(*W_VI.shape))
        sensitivity[name] = _sensitivity(replay, samples, name, W_VI, metric, method)
        grams[name] = gram_II.float()
    return ObservedEmbeddings(menus, sensitivity, grams)


def _sensitivity(
    replay: Replay, samples: Samples, name: str, W_VI: Tensor, metric: Metric, method: Gguf
) -> float:
    """KL per unit of relative error, from one perturbation near 4 bit."""
    model, probed = replay.model, probe_samples(samples)
    weights_I = metric.single.gram.diagonal()
    A_VI = torch.cat([method.probe_of_rows(rows.float(), weights_I) for rows in W_VI.split(_ROWS)])
    lost = sum(
        metric.energy(w.float() - a) for w, a in zip(W_VI.split(_ROWS), A_VI.split(_ROWS), strict=True)
    )
    if lost == 0:
        return 0.0
    with in_float32(model, replay.layout):
        dense = logits_of(run_model(model, probed))
        parameter = model.get_submodule(name).weight
        assert isinstance(parameter, nn.Parameter)
        before = parameter.data
        parameter.data = A_VI.to(before)
        try:
            moved = logits_of(run_model(model, probed))
        finally:
            parameter.data = before
        return distance(model, dense, moved) * _energy(metric, W_VI) / lost


def _fit(model: Model, name: str, gram_II: Tensor, method: Method, plan: Plan) -> Fitted:
    W_VI, choice = _matrix(model, name), plan.choices[name]
    if choice.is_dense:
        return Fitted(choice, 0.0, 0.0, Status(State.DENSE))
    metric = Metric(gram_II.to(exact_device(compute_device(model)), torch.float64), damps_by_channel=True)
    parts = []
    for rows_RI in W_VI.split(_ROWS):
        parts.append(method.solve(LayerProblem(rows_RI.float(), metric, model.dtype, 0.0), choice))
    lost = sum(
        metric.energy(rows_RI.float() - part.W_OI)
        for rows_RI, part in zip(W_VI.split(_ROWS), parts, strict=True)
    )
    entry = parts[0].layer.to_dict()
    layer, shape = parse_layer(name, entry), Shape(*W_VI.shape)
    tensors = {
        key: torch.cat([part.tensors[key] for part in parts]) for key in parts[0].tensors if key == "blocks"
    }
    return Fitted(
        replace(choice, nbytes=int(layer.nbytes(shape))), lost / _energy(metric, W_VI), 0.0, parts[0].status,
        entry=entry, tensors=tensors,
    )  # fmt: skip


def _matrix(model: Model, name: str) -> Tensor:
    """A matrix, where the model runs."""
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach().to(compute_device(model))


def _energy(metric: Metric, W_VI: Tensor) -> float:
    return sum(metric.energy(rows.float()) for rows in W_VI.split(_ROWS)) or 1.0


def _metric_of(model: Model, name: str, samples: Samples, W_VI: Tensor) -> Tensor:
    """(I, I) float64."""
    device, width = exact_device(compute_device(model)), W_VI.shape[1]
    identity_II = torch.eye(width, dtype=torch.float64, device=device)
    head = model.get_output_embeddings()
    is_head = head is not None and (is_tied(model) or model.get_submodule(name) is head)
    if not is_head:
        return identity_II
    moments = Moments(width, device)
    for x in _read_by(model, head, samples):
        moments.update_(x)
        if moments.count > _TOKENS_PER_COLUMN * width:
            break
    if not is_tied(model):
        return moments.gram
    by_outputs = _energy(Metric(moments.gram), W_VI)
    by_rows = float((W_VI.float() ** 2).sum(dtype=torch.float64)) or 1.0
    return moments.gram / by_outputs + identity_II / by_rows


def _read_by(model: Model, head: nn.Module, samples: Samples) -> Iterator[Tensor]:
    """What the head reads, sample by sample."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    for sample in samples.split(1):
        with ExitStack() as hooks:
            hooks.callback(head.register_forward_pre_hook(stop).remove)
            with suppress(_Reached):
                run_model(model, sample)
        yield seen.pop()
