"""A block's derivatives are those of finite differences, and leave nothing behind."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lrsd.model.derivatives import _probe, with_derivatives
from lrsd.model.layout import find_layout
from lrsd.model.load import load_model
from lrsd.model.replay import Replay
from lrsd.model.samples import Samples
from lrsd.steps.statistics import Weights, block_statistics
from lrsd.work.streams import Stream


@pytest.fixture
def replay(tiny_model_dir: Path) -> Replay:
    loaded = load_model(str(tiny_model_dir), dtype="float32")
    tokens = torch.arange(2 * 12).view(2, 12) * 7 % 290 + 3
    layout = find_layout(loaded.model, loaded.kind.example(loaded.model)).one_by_one()
    with torch.no_grad():
        return Replay.start(loaded.model, layout, list(Samples({"input_ids": tokens}).split(1)))


@torch.no_grad()
def test_squares_are_those_of_finite_differences(replay: Replay) -> None:
    """d <z, y> / d o_ti, of every layer, at single outputs."""
    hidden = replay.inputs[0][0]
    output, inputs, squares = with_derivatives(replay, 0, 0, hidden)
    assert torch.equal(output, replay.run(0, 0, hidden))
    z = _probe(output, 0, 0).double()
    names = [spec.name for group in replay.layout.blocks[0].groups for spec in group.linears]
    assert sorted(squares) == sorted(names) == sorted(inputs)
    for name in names:
        module = replay.model.get_submodule(name)
        size = 1e-2 * float(module(inputs[name]).abs().mean())
        for token, channel in ((0, 0), (3, 5), (11, 2)):
            change = [
                (moved(replay, module, hidden, token, channel, sign * size).double() * z).sum()
                for sign in (1, -1)
            ]
            expected = float((change[0] - change[1]) / (2 * size)) ** 2
            largest = float(squares[name].max())
            assert float(squares[name][token, channel]) == pytest.approx(
                expected, rel=0.05, abs=1e-3 * largest
            ), name


def moved(replay: Replay, module: nn.Module, hidden: Tensor, token: int, channel: int, size: float) -> Tensor:
    def shift(module: nn.Module, args: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[0, token, channel] += size
        return output

    handle = module.register_forward_hook(shift)
    try:
        return replay.run(0, 0, hidden)
    finally:
        handle.remove()


def test_a_token_counts_relative_to_its_norm() -> None:
    """The first token's state is hundreds of times the others', and what follows normalizes both."""
    output = torch.randn(2, 300, 64) * torch.tensor([1e-3, 1.0, 1e3]).repeat(100)[:, None]
    z = _probe(output, 3, 1) * output.norm(dim=-1, keepdim=True)
    assert float(z.mean()) == pytest.approx(0, abs=0.02)
    for scale in range(3):
        assert float(z[:, scale::3].std()) == pytest.approx(1, rel=0.02)


@torch.no_grad()
def test_nothing_is_left_behind(replay: Replay) -> None:
    hidden = replay.inputs[0][0]
    before = {name: parameter.clone() for name, parameter in replay.model.named_parameters()}
    first, second = (with_derivatives(replay, 0, 0, hidden)[2] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = with_derivatives(replay, 0, 1, replay.inputs[0][1])[2]
    assert not any(torch.equal(first[name], other[name]) for name in first)
    for name, parameter in replay.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in replay.model.modules())
    assert not hidden.requires_grad


class _Rounded(torch.autograd.Function):
    """An operation without a derivative."""

    @staticmethod
    def forward(context: object, x: Tensor) -> Tensor:
        return x * 2


def broken(after: int) -> Callable[..., Tensor]:
    calls = 0

    def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return _Rounded.apply(output) if calls > after else output

    return hook


@torch.no_grad()
def test_a_block_without_derivative_weighs_all_alike_and_says_why(replay: Replay) -> None:
    module = replay.model.get_submodule(replay.layout.blocks[0].name + ".mlp.act_fn")
    handle = module.register_forward_hook(broken(after=0))
    weights = Weights(rows=True, tokens=True)
    found = block_statistics(replay, 0, replay.inputs[0], Stream(), weights)
    handle.remove()
    assert "cannot be differentiated" in weights.missing
    plain = block_statistics(replay, 0, replay.inputs[0], Stream(), Weights())
    assert all(not group.rows and not group.tokens for group in found.values())
    names = [name for name in found if "down_proj" not in name]
    assert all(torch.equal(found[name].moments.gram, plain[name].moments.gram) for name in names)
    handle = module.register_forward_hook(broken(after=1))
    with pytest.raises((RuntimeError, NotImplementedError)):  # no statistics that are weighed by halves
        block_statistics(replay, 0, replay.inputs[0], Stream(), Weights(rows=True, tokens=True))
    handle.remove()
