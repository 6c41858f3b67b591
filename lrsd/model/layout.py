"""Where a model keeps its blocks and linear weights, found by looking rather than by family name."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lrsd.errors import InputError
from lrsd.numerics.allocate import Shape


@dataclass(frozen=True)
class LinearSpec:
    """One linear weight: its module name, its shape (O, I), and the bias it came with."""

    name: str
    shape: Shape
    has_bias: bool
    transposed: bool


@dataclass(frozen=True)
class InputGroup:
    """Linears of one block that read the same input tensor, e.g. q, k and v; in call order.

    adds_to_stream: the outputs go into the residual stream as they are, so that the block's output
    contains them one to one.
    """

    linears: tuple[LinearSpec, ...]

    @property
    def name(self) -> str:
        return self.linears[0].name

    @property
    def in_features(self) -> int:
        return self.linears[0].shape.in_features


@dataclass(frozen=True)
class Block:
    """One decoder layer: its module name and its input groups in call order."""

    name: str
    groups: tuple[InputGroup, ...]


@dataclass(frozen=True)
class Layout:
    """All blocks in order. `linears` is every compressible weight."""

    blocks: tuple[Block, ...]
    stream_width: int
    untouched: tuple[str, ...] = field(default=())

    @property
    def linears(self) -> dict[str, LinearSpec]:
        return {spec.name: spec for group in self.groups for spec in group.linears}

    @property
    def groups(self) -> list[InputGroup]:
        return [group for block in self.blocks for group in block.groups]


def find_layout(model: PreTrainedModel) -> Layout:
    """Trace one short forward pass: which linears run, in what order, on which shared inputs.

    Blocks are the members of the module list that holds most linear weights.

    Raises: InputError if the model has no such list or no linear weights in it.
    """
    blocks_name, blocks = _block_list(model)
    calls: list[list[tuple[str, int]]] = [[] for _ in blocks]
    names = {module: name for name, module in model.named_modules()}
    kept_alive: list[Tensor] = []  # so that no two inputs of the trace share a storage address

    def record(block: int, module: nn.Module, x: Tensor) -> None:
        kept_alive.append(x)
        calls[block].append((names[module], x.data_ptr()))

    handles = [
        module.register_forward_pre_hook(lambda m, args, block=index: record(block, m, args[0]))
        for index, block in enumerate(blocks)
        for module in block.modules()
        if is_linear(module)
    ]
    try:
        with torch.inference_mode():
            tokens = torch.zeros(1, 8, dtype=torch.int64, device=model.device)
            width = int(model(tokens, use_cache=False, output_hidden_states=True).hidden_states[0].shape[-1])
    finally:
        for handle in handles:
            handle.remove()
    traced = tuple(
        Block(f"{blocks_name}.{index}", _groups(model, block_calls))
        for index, block_calls in enumerate(calls)
    )
    found = {name for block_calls in calls for name, _ in block_calls}
    untouched = tuple(n for n, m in model.named_modules() if is_linear(m) and n not in found)
    if not found:
        raise InputError(
            f"{type(model).__name__} runs no linear layer inside its blocks {blocks_name!r}; "
            "lrsd compresses nn.Linear and Conv1D weights only"
        )
    return Layout(traced, width, untouched)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def read_weight(model: nn.Module, spec: LinearSpec) -> Tensor:
    """The weight as (O, I) float32 on its device, whatever its storage."""
    weight = model.get_submodule(spec.name).weight
    assert isinstance(weight, Tensor)
    return (weight.T if spec.transposed else weight).detach().float()


@contextmanager
def replaced_weight(model: nn.Module, spec: LinearSpec, W_OI: Tensor, dtype: torch.dtype) -> Iterator[None]:
    """The model with another weight in one place, for as long as the context lasts."""
    module = model.get_submodule(spec.name)
    original = module.weight
    assert isinstance(original, nn.Parameter)
    stored = W_OI.T.contiguous() if spec.transposed else W_OI
    module.weight = nn.Parameter(stored.to(dtype), requires_grad=False)
    try:
        yield
    finally:
        module.weight = original


def exchange_weight(model: nn.Module, spec: LinearSpec, W_OI: Tensor) -> nn.Parameter:
    """Put another weight in place; the old one is returned."""
    module = model.get_submodule(spec.name)
    original = module.weight
    assert isinstance(original, nn.Parameter)
    stored = (W_OI.T if spec.transposed else W_OI).to(original.dtype).contiguous()
    module.weight = nn.Parameter(stored, requires_grad=False)
    return original


def _block_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    def size(modules: nn.ModuleList) -> int:
        return sum(m.weight.numel() for m in modules.modules() if is_linear(m))  # type: ignore[misc, operator]

    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    sized = [(size(modules), name, modules) for name, modules in lists]
    if not sized or max(sized, key=lambda item: item[0])[0] == 0:
        raise InputError(
            f"{type(model).__name__} has no list of blocks with linear layers; nothing to compress"
        )
    _, name, modules = max(sized, key=lambda item: item[0])
    return name, modules


def _groups(model: PreTrainedModel, calls: list[tuple[str, int]]) -> tuple[InputGroup, ...]:
    by_input: dict[int, list[LinearSpec]] = {}
    seen: set[str] = set()
    for name, pointer in calls:
        if name in seen:
            raise InputError(f"{name} runs more than once per block; weight sharing is not supported yet")
        seen.add(name)
        by_input.setdefault(pointer, []).append(_spec(model, name))
    return tuple(InputGroup(tuple(specs)) for specs in by_input.values())


def _spec(model: PreTrainedModel, name: str) -> LinearSpec:
    module = model.get_submodule(name)
    transposed = isinstance(module, Conv1D)
    weight = module.weight
    assert isinstance(weight, Tensor)
    out_features, in_features = weight.shape[::-1] if transposed else weight.shape
    return LinearSpec(name, Shape(out_features, in_features), module.bias is not None, transposed)
