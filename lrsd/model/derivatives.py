"""How much a block's output depends on what each of its layers puts out: one vector-Jacobian product of that
block alone. Nothing is trained, and no pass through the whole model is differentiated."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lrsd.model.replay import Replay


def with_derivatives(
    replay: Replay, index: int, batch: int, hidden: Tensor
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """What `Replay.run_with_inputs` gives, and the squared derivative of every layer of the block.

    With y_t the block's output, z_t normally distributed over ||y_t||, and o_t what a layer puts out, that is
    (J^T z)_ti^2 with J = dy/do: on average over z the squared change of all of the output, relative to each
    token's norm, that a change of o_ti makes.

    Returns: output; inputs by group name; (tokens, O) float32 by layer name, none of a layer that no token
    reached. Raises: RuntimeError of a block that cannot be differentiated.
    """
    model, block = replay.model, replay.layout.blocks[index]
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            outputs.setdefault(name, []).append(output)

        return hook

    with ExitStack() as hooks, torch.enable_grad(), _repeatable(hidden.device):
        for spec in (spec for group in block.groups for spec in group.linears):
            hooks.callback(model.get_submodule(spec.name).register_forward_hook(keep(spec.name)).remove)
        entering = hidden.detach().clone().requires_grad_()
        output, inputs = replay.run_with_inputs(index, batch, entering)
        names = [name for name, calls in outputs.items() for _ in calls]
        found = torch.autograd.grad(
            output, [o for calls in outputs.values() for o in calls], _probe(output.detach(), index, batch),
            allow_unused=True,
        )  # fmt: skip
    squares: dict[str, list[Tensor]] = {}
    for name, derivative in zip(names, found, strict=True):
        if derivative is not None:
            flat = derivative.float().square_().reshape(-1, derivative.shape[-1])
            squares.setdefault(name, []).append(flat)
    inputs = {name: x.detach() for name, x in inputs.items()}
    return output.detach(), inputs, {name: torch.cat(parts) for name, parts in squares.items()}


def _repeatable(device: torch.device) -> AbstractContextManager[None]:
    """The fast kernels of attention on CUDA add up their derivatives in an order of the moment, and channels'
    weights are rounded from them: the same command would give other bytes."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


def _probe(output: Tensor, index: int, batch: int) -> Tensor:
    """z: the same for the same block and batch, whatever ran before."""
    generator = torch.Generator().manual_seed(index << 32 | batch)
    z = torch.randn(output.shape, generator=generator).to(output.device)
    norms = output.float().norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (z / norms).to(output.dtype)
