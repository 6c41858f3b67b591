"""Where a model keeps its blocks and linear weights, found by looking rather than by family name."""

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrsd.errors import InputError
from lrsd.forms.base import VALUE_BYTES, Shape
from lrsd.model.experts import DOWNS, UPS, is_unfused
from lrsd.model.samples import Samples, reads_several_media, try_running
from lrsd.model.slots import SLOTS, is_linear, weight_slot
from lrsd.settings import Selection


@dataclass(frozen=True)
class LinearSpec:
    """One linear weight: its module name, its shape (O, I), and the bias it came with."""

    name: str
    shape: Shape
    has_bias: bool


@dataclass(frozen=True)
class InputGroup:
    """Linears of one block that read the same inputs, e.g. q, k and v; in call order.

    routed: only some tokens reach them, those that a router sends to one expert; the name of the module
    list of all experts then. repeated: they run more than once per block.
    """

    linears: tuple[LinearSpec, ...]
    routed: str | None = None
    repeated: bool = False

    @property
    def name(self) -> str:
        return self.linears[0].name

    @property
    def in_features(self) -> int:
        return self.linears[0].shape.in_features

    @property
    def token_aligned(self) -> bool:
        """Whether every pass has one input here for every token, so that two passes can be compared."""
        return self.routed is None and not self.repeated


@dataclass(frozen=True)
class Block:
    """One layer of a stack: its module name, its input groups in call order, and the number of its stack.

    is_first: its input is the stack's.
    """

    name: str
    groups: tuple[InputGroup, ...]
    stack: int
    is_first: bool


@dataclass(frozen=True)
class Layout:
    """All blocks in the order in which they run, the encoder's before the decoder's.

    `linears` is every compressible weight. untouched: other linear layers and why they stay dense.
    """

    blocks: tuple[Block, ...]
    stream_width: int
    untouched: dict[str, str] = field(default_factory=dict)

    @cached_property
    def linears(self) -> dict[str, LinearSpec]:
        return {spec.name: spec for group in self.groups for spec in group.linears}

    @cached_property
    def groups(self) -> list[InputGroup]:
        return [group for block in self.blocks for group in block.groups]

    def one_by_one(self) -> "Layout":
        """The same with a group of its own for every linear, as where each weighs its tokens differently."""
        blocks = [
            replace(b, groups=tuple(replace(g, linears=(s,)) for g in b.groups for s in g.linears))
            for b in self.blocks
        ]
        return replace(self, blocks=tuple(blocks))

    @cached_property
    def stacks(self) -> int:
        return 1 + max(block.stack for block in self.blocks)


def find_layout(model: PreTrainedModel, example: Samples, selection: Selection | None = None) -> Layout:
    """Trace one forward pass: which linears run in which block, in what order, on which shared inputs.

    Blocks are the members of the module lists that hold most linear weights: of one list, or of the
    encoder's and the decoder's. Experts are taken from their modules, since a short pass reaches few.

    Raises: InputError if the model has no such list or no linear weights in it.
    """
    selection = selection or Selection()
    lists = _block_lists(model)
    shared, usual = _shared_weights(model), _usual_type(lists)
    names = {module: name for name, module in model.named_modules()}
    places = [(stack, index) for stack, (_, blocks) in enumerate(lists) for index in range(len(blocks))]
    calls: dict[tuple[int, int], list[tuple[str, tuple[int, ...]]]] = {place: [] for place in places}
    runs = dict.fromkeys(places, 0)
    kept_alive: list[Tensor] = []  # so that no two inputs of the trace share a storage address

    def record(place: tuple[int, int], module: nn.Module, x: Tensor) -> None:
        kept_alive.append(x)
        calls[place].append((names[module], (x.data_ptr(), *x.shape)))

    def count(place: tuple[int, int]) -> None:
        runs[place] += 1

    handles = [
        module.register_forward_pre_hook(lambda m, args, place=(stack, index): record(place, m, args[0]))
        for stack, (_, blocks) in enumerate(lists)
        for index, block in enumerate(blocks)
        for module in _plain_linears(block)
    ] + [
        lists[stack][1][index].register_forward_pre_hook(lambda m, args, place=(stack, index): count(place))
        for stack, index in places
    ]
    try:
        try_running(model, example)
    finally:
        for handle in handles:
            handle.remove()
    if any(number != 1 for number in runs.values()):
        raise InputError(
            f"{type(model).__name__} runs its blocks {sorted(set(runs.values()))} times per pass; "
            "lrsd compresses models that run each block once"
        )
    untouched: dict[str, str] = {}
    traced = []
    for stack, (lists_name, blocks) in enumerate(lists):
        for index, block in enumerate(blocks):
            name = f"{lists_name}.{index}"
            routed = [
                *_expert_groups(model, name, block),
                *_listed_experts(model, name, block, calls[stack, index]),
            ]
            experts = {spec.name for group in routed for spec in group.linears}
            shared_by_all = [call for call in calls[stack, index] if call[0] not in experts]
            groups = [*_groups(model, shared_by_all), *routed]
            chosen = (_chosen(model, group, selection, shared, usual, untouched) for group in groups)
            traced.append(Block(name, tuple(group for group in chosen if group), stack, index == 0))
    layout = Layout(tuple(traced), _stream_width(model), untouched)
    left = dict[str, nn.Module](model.named_modules())
    for name in [name for name in left if name not in layout.linears and name not in untouched]:
        if isinstance(left[name], tuple(SLOTS)):
            untouched[name] = _reason_against(model, left[name])
    for traced_block in layout.blocks:
        module = model.get_submodule(traced_block.name)
        for name, parameter in module.named_parameters(traced_block.name):
            if parameter.dim() == 3:
                owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
                untouched[name] = f"a 3-D weight of a {owner}"
    if not layout.linears:
        raise InputError(
            f"{type(model).__name__} runs no linear layer inside its blocks "
            f"{' and '.join(name for name, _ in lists)} that may be compressed; "
            "lrsd compresses nn.Linear, Conv1D and fused experts' weights only"
        )
    return layout


def _plain_linears(block: nn.Module) -> list[nn.Module]:
    """Linear layers of a block but those of its experts."""
    routed = {m for experts in block.modules() if is_unfused(experts) for m in experts.modules()}
    return [module for module in block.modules() if is_linear(module) and module not in routed]


def _stream_width(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    return int(getattr(config, "hidden_size", None) or config.d_model)


def _usual_type(lists: list[tuple[str, nn.ModuleList]]) -> torch.dtype:
    """That of most linear weights."""
    sizes = Counter[torch.dtype]()
    for module in (module for _, blocks in lists for module in blocks.modules() if is_linear(module)):
        weight = module.weight
        assert isinstance(weight, Tensor)
        sizes[weight.dtype] += weight.numel()
    return max(sizes, key=sizes.__getitem__)


def _shared_weights(model: PreTrainedModel) -> dict[str, str]:
    """Modules whose weight another module holds too, or that have several names, and one other holder."""
    holders: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if (weight := module._parameters.get("weight")) is not None:
            holders.setdefault(weight, []).append(name)
    return {
        name: next(other for other in names if other != name)
        for names in holders.values()
        for name in names
        if len(names) > 1
    }


def _reason_against(model: PreTrainedModel, module: nn.Module) -> str:
    """Why a linear layer that no block has among its own stays dense."""
    if not is_linear(module):
        return f"a {type(module).__name__}, which does more than multiply"
    return "the model's head" if module is model.get_output_embeddings() else "not run within a block"


def _chosen(
    model: PreTrainedModel,
    group: InputGroup,
    selection: Selection,
    shared: dict[str, str],
    usual: torch.dtype,
    untouched: dict[str, str],
) -> InputGroup | None:
    def reason(spec: LinearSpec) -> str | None:
        if spec.name in shared:
            return f"its weight is also that of {shared[spec.name]}"
        own = weight_slot(model, spec.name).parameter.dtype
        if own != usual:
            return f"kept in {str(own).removeprefix('torch.')} by the model"
        return selection.reason_against(spec.name, spec.shape.dense_bytes // VALUE_BYTES)

    reasons = {spec.name: reason(spec) for spec in group.linears}
    untouched |= {name: reason for name, reason in reasons.items() if reason}
    linears = tuple(spec for spec in group.linears if reasons[spec.name] is None)
    return replace(group, linears=linears) if linears else None


def block_names(model: PreTrainedModel) -> list[str]:
    """Of the blocks that a model runs, in this order; experts are to be taken apart already.

    Raises: InputError if it has none.
    """
    return [f"{name}.{index}" for name, blocks in _block_lists(model) for index in range(len(blocks))]


def _block_lists(model: PreTrainedModel) -> list[tuple[str, nn.ModuleList]]:
    """The list of blocks, or the encoder's and the decoder's, in the order in which they run; of a model of
    several media that of its text decoder."""
    stacks: list[nn.Module] = [model]
    if model.config.is_encoder_decoder:
        stacks = [model.get_encoder(), model.get_decoder()]
    elif reads_several_media(model.config):
        stacks = [model.get_decoder()]
    names = {module: name for name, module in model.named_modules()}
    return [(names[blocks], blocks) for blocks in (_largest_list(model, stack) for stack in stacks)]


def _largest_list(model: PreTrainedModel, stack: nn.Module) -> nn.ModuleList:
    def size(modules: nn.ModuleList) -> int:
        return sum(m.weight.numel() for m in modules.modules() if is_linear(m))  # type: ignore[misc, operator]

    lists = [m for m in stack.modules() if isinstance(m, nn.ModuleList) and len(m)]
    largest = max(lists, key=size, default=None)
    if largest is None or size(largest) == 0:
        raise InputError(
            f"{type(model).__name__} has no list of blocks with linear layers; nothing to compress"
        )
    return largest


def _groups(model: PreTrainedModel, calls: list[tuple[str, tuple[int, ...]]]) -> list[InputGroup]:
    """Linears by the inputs that they read in one pass, all of them where they run more than once."""
    inputs: dict[str, tuple[tuple[int, ...], ...]] = {}
    for name, pointer in calls:
        inputs[name] = (*inputs.get(name, ()), pointer)
    by_input: dict[tuple[tuple[int, ...], ...], list[LinearSpec]] = {}
    for name, read in inputs.items():
        by_input.setdefault(read, []).append(_spec(model, name))
    return [InputGroup(tuple(specs), repeated=len(read) > 1) for read, specs in by_input.items()]


def _expert_groups(model: PreTrainedModel, block_name: str, block: nn.Module) -> list[InputGroup]:
    return [
        InputGroup((_spec(model, f"{block_name}.{name}.{part}.{expert}"),), f"{block_name}.{name}.{part}")
        for name, module in block.named_modules()
        if is_unfused(module)
        for part in (UPS, DOWNS)
        for expert in range(len(getattr(module, part)))
    ]


def _listed_experts(
    model: PreTrainedModel, block_name: str, block: nn.Module, calls: list[tuple[str, tuple[int, ...]]]
) -> list[InputGroup]:
    """Experts that are modules of their own in a list or dictionary: members of one class, some of which saw
    fewer tokens than other layers did, or none."""
    tokens: dict[str, int] = {}
    for name, (_, *shape) in calls:
        tokens[name] = max(tokens.get(name, 0), prod(shape[:-1]))
    most = max(tokens.values(), default=0)
    groups: list[InputGroup] = []
    for place, experts in block.named_modules():
        inner = any(group.name.startswith(f"{block_name}.{place}.") for group in groups)
        unfused = is_unfused(block.get_submodule(place.rpartition(".")[0]))
        if not isinstance(experts, nn.ModuleList | nn.ModuleDict) or inner or unfused:
            continue
        found: dict[str, str] = {}
        classes = []
        for key, expert in experts.named_children():
            parts = [part for part, module in expert.named_modules() if is_linear(module)]
            classes += [type(expert)] if parts else []
            for part in parts:
                name = ".".join(filter(None, (block_name, place, key, part)))
                found[name] = ".".join(filter(None, (block_name, place, part)))
        if len(set(classes)) == 1 < len(classes) and any(tokens.get(name, 0) < most for name in found):
            groups += [InputGroup((_spec(model, name),), routed) for name, routed in found.items()]
    return groups


def _spec(model: PreTrainedModel, name: str) -> LinearSpec:
    slot = weight_slot(model, name)
    return LinearSpec(name, slot.shape, slot.bias is not None)
