"""Run a model block by block on cached hidden states, looking at the inputs of its linears."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from lrsd.errors import InputError
from lrsd.model.arithmetic import fast_products
from lrsd.model.layout import Block, Layout
from lrsd.model.load import check_finite, exact_device
from lrsd.model.samples import Samples, logits_of, run_model
from lrsd.work.onloading import compute_device, is_too_wide
from lrsd.work.streams import Stream
from lrsd.work.world import World


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a hook to leave a forward pass as soon as it has what it came for."""


# Batch number, hidden states before the block, its output, the inputs of its groups by name.
Observer = Callable[[int, Tensor, Tensor, dict[str, Tensor]], None]


class Residual(Enum):
    """Where a layer's output is added to the residual stream: what the block gives, or what a part of it
    reads."""

    AFTER = "after"
    AMID = "amid"
    NOWHERE = "nowhere"


@dataclass(frozen=True)
class _Call:
    """What a block was called with besides its hidden states, and what it returned besides them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rest: tuple[Any, ...] | None


@dataclass(frozen=True)
class Replay:
    """The blocks of one model, each callable on cached hidden states of a numbered batch.

    What a block is called with besides (rotary embeddings, masks) mostly depends on the batch's shape only,
    since samples are unpadded; in a decoder that looks at an encoder, also on the encoder's output: that of
    the model as it was at the start. calls: per batch, per block; shared by batches of one shape if the
    first two of them agree.
    inputs: the hidden states that enter each stack's first block.
    encoded: what the encoder gives for the first batch, where there is one, in its own type: experts' routing
    is among it.
    batch_sizes: samples per batch.
    finished: to be called with a block's module when its weights will not be read for a while.
    world: whose batches these are.
    """

    model: PreTrainedModel
    layout: Layout
    calls: tuple[list[_Call], ...]
    inputs: tuple[Stream, ...]
    encoded: Any
    batch_sizes: tuple[int, ...]
    finished: Callable[[nn.Module], None]
    world: World = field(default_factory=World)
    _residuals: dict[tuple[type, str], Residual] = field(default_factory=dict)

    @staticmethod
    def start(
        model: PreTrainedModel,
        layout: Layout,
        batches: Iterable[Samples],
        new_stream: Callable[[str], Stream] = lambda name: Stream(),
        finished: Callable[[nn.Module], None] = lambda block: None,
        world: World | None = None,
    ) -> "Replay":
        """Raises: InputError if the model does something between two blocks, or runs one twice."""
        world = world or World()
        calls: list[list[_Call]] = []
        entering = tuple(new_stream(f"entering-{stack}") for stack in range(layout.stacks))
        encoded: Any = None
        by_shape: dict[Any, list[list[_Call]]] = {}
        sizes: list[int] = []
        for number, samples in enumerate(batches):
            sizes.append(len(samples))
            alike = by_shape.setdefault(samples.shapes, [])
            shared = layout.stacks == 1 and len(alike) > 1 and _same(alike[0], alike[1])
            calls.append(alike[0] if shared else [])
            if not world.owns(number) and (shared or (layout.stacks > 1 and number > 0)):
                continue  # another process runs it; of batch 0 all know the calls
            traced = _trace(model, layout, samples, only_entry=shared)
            if world.owns(number):
                for stream, hidden in zip(entering, traced.entering, strict=True):
                    stream.put(number, hidden)
            encoded = traced.encoded if encoded is None else encoded
            if not shared:
                calls[number] = traced.calls
            if len(alike) < 2:
                alike.append(traced.calls)
        world.wait()
        return Replay(model, layout, tuple(calls), entering, encoded, tuple(sizes), finished, world)

    def waves(self, blocks: range | None = None) -> Iterator[range]:
        """Numbers of these blocks, or of all, as many at a time as there are processes to own one each."""
        blocks = range(len(self.layout.blocks)) if blocks is None else blocks
        for start in range(blocks.start, blocks.stop, self.world.size):
            yield range(start, min(start + self.world.size, blocks.stop))

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return compute_device(self.model)

    def solver_device(self, width: int) -> torch.device:
        """Where moments and solvers of layers of so many inputs are."""
        return torch.device("cpu") if is_too_wide(self.model, width) else exact_device(self.device)

    def block(self, index: int) -> nn.Module:
        return self.model.get_submodule(self.layout.blocks[index].name)

    def run(self, index: int, batch: int, hidden: Tensor) -> Tensor:
        """Output of one block for the hidden states of one batch."""
        call = self.calls[batch][index]
        with fast_products(hidden.dtype, hidden.device):
            output = self.block(index)(hidden, *call.args, **_apart(call.kwargs))
        return output[0] if isinstance(output, tuple | list) else output

    def pass_(
        self,
        index: int,
        before: Stream,
        outputs: Stream | None = None,
        observe: Observer | None = None,
        *,
        until: str | None = None,
        run: "Callable[[int, int, Tensor], tuple[Tensor, dict[str, Tensor]]] | None" = None,
    ) -> None:
        """Run one block on every batch of this process: the only loop over batches.

        Args: before, outputs: where its hidden states come from and go to; observe: called with number,
            hidden states, output, and inputs by group name; until: the one group to look at, what comes after
            it in the block not being run: there is no output then; run: what runs a batch, instead of
            `run_with_inputs`.
        """
        for batch in self.world.share(len(before)):
            hidden = before[batch]
            if until is not None:
                output, inputs = hidden, {until: self.input_of(index, until, batch, hidden)}
            elif observe is not None:
                output, inputs = (run or self.run_with_inputs)(index, batch, hidden)
            else:
                output, inputs = self.run(index, batch, hidden), {}
            if outputs is not None:
                outputs.put(batch, output)
            if observe is not None:
                observe(batch, hidden, output, inputs)

    def run_with_inputs(self, index: int, batch: int, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Output of one block and the input of each of its groups, by group name.

        A group that runs more than once has its inputs' tokens one after the other, (tokens, width);
        one that no token was routed to has none.
        """
        inputs: dict[str, list[Tensor]] = {}
        with _on_input(
            self.model, self.layout.blocks[index], lambda n, x: inputs.setdefault(n, []).append(x)
        ):
            output = self.run(index, batch, hidden)
        return output, {name: x[0] if len(x) == 1 else _joined(x) for name, x in inputs.items()}

    def input_of(self, index: int, group: str, batch: int, hidden: Tensor) -> Tensor:
        """Input of one group of a block; what comes after it in the block is not run."""
        inputs: dict[str, Tensor] = {}

        def stop(name: str, x: Tensor) -> None:
            if name == group:
                inputs[name] = x
                raise _Reached

        with _on_input(self.model, self.layout.blocks[index], stop), suppress(_Reached):
            self.run(index, batch, hidden)
        return inputs[group]

    def residual_of(self, index: int, linear: str, hidden: Tensor) -> Residual:
        """Where this linear's output is added to the residual stream, one to one.

        Tried on batch 0 of the first block of its class, not assumed: the linear's output is shifted, and
        the block's output has to follow, or what a module after it reads to be the sum of it and `hidden`.
        """
        block = self.block(index)
        key = type(block), linear.removeprefix(self.layout.blocks[index].name)
        if key not in self._residuals:
            self._residuals[key] = self._tried_residual(index, linear, hidden)
        return self._residuals[key]

    def _tried_residual(self, index: int, linear: str, hidden: Tensor) -> Residual:
        plain = self.run(index, 0, hidden).float()
        shift = plain.abs().mean()
        sums: list[Tensor] = []
        amid = False

        def follows(found: Tensor, expected: Tensor) -> bool:
            # 16-bit rounding of the shifted sum allows no more than a few per cent of the shift.
            return found.shape == expected.shape and bool((found - expected).abs().median() < 0.05 * shift)

        def shifted(module: nn.Module, args: object, output: Tensor) -> Tensor:
            output = output + shift.to(output.dtype)
            if output.numel() == hidden.numel():
                sums.append(hidden.float() + output.float().view_as(hidden))
            return output

        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal amid
            if sums and not amid and args and isinstance(args[0], Tensor):
                amid = follows(args[0].float(), sums[0])

        with ExitStack() as hooks:
            hooks.callback(self.model.get_submodule(linear).register_forward_hook(shifted).remove)
            for module in self.block(index).modules():
                hooks.callback(module.register_forward_pre_hook(look).remove)
            moved = self.run(index, 0, hidden).float()
        if amid:
            return Residual.AMID  # what follows may not notice a shift, which a norm takes away
        return Residual.AFTER if follows(moved, plain + shift) else Residual.NOWHERE

    def logits_from(self, index: int, samples: Samples, hidden: Tensor, every: int = 1) -> Tensor:
        """The model's logits for batch 0, `samples`, when block `index` reads `hidden`; the model's own code
        runs what follows.

        every: of a causal model, the logits of every so many tokens only, which spares most of the head.
        """
        more: dict[str, Any] = {}
        if self.layout.blocks[index].stack > 0:
            more["encoder_outputs"] = self.encoded
        thinned = "logits_to_keep" in signature(self.model.forward).parameters
        if thinned:
            tokens = samples.inputs["input_ids"].shape[1]
            more["logits_to_keep"] = torch.arange(0, tokens, every, device=hidden.device)

        left = {n: v for n, v in self.calls[0][index].kwargs.items() if isinstance(v, MutableMapping)}

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            for name, values in left.items():
                kwargs[name].update(values)  # what the blocks that are skipped would have left for later ones
            if args:
                return (hidden, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": hidden}

        handle = self.block(index).register_forward_pre_hook(enter, with_kwargs=True)
        try:
            with self._skipped(index):
                return logits_of(run_model(self.model, samples, **more))
        finally:
            handle.remove()

    @contextmanager
    def _skipped(self, count: int) -> Iterator[None]:
        """The first `count` blocks hand their input through, for as long as the context lasts."""
        blocks = [(self.block(index), self.calls[0][index]) for index in range(count)]
        for block, call in blocks:
            block.forward = partial(_hand_through, call.rest)
        try:
            yield
        finally:
            for block, _ in blocks:
                del block.forward


def _hand_through(rest: tuple[Any, ...] | None, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    return hidden_states if rest is None else (hidden_states, *rest)


def _same(a: Any, b: Any) -> bool:
    """Whether two blocks' calls, or parts of them, are equal; what cannot be compared is not."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, _Call) and isinstance(b, _Call):
        return _same(a.args, b.args) and _same(a.kwargs, b.kwargs) and _same(a.rest, b.rest)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or (isinstance(a, bool | int | float | str) and a == b)


def _kept(value: Any) -> Any:
    """An argument as it is to be used again: without caches, which grow, and apart from parameters, which
    change."""
    if isinstance(value, Cache):
        return None
    if isinstance(value, tuple):
        return tuple(_kept(item) for item in value)
    return value.detach().clone() if isinstance(value, nn.Parameter) else value


def _apart(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments that a block may write to, for later ones to read (keys and values that are shared), apart
    from those that are kept."""
    return {
        name: copy(value) if isinstance(value, MutableMapping) else value for name, value in kwargs.items()
    }


def _joined(inputs: list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])


@contextmanager
def _on_input(model: nn.Module, block: Block, see: Callable[[str, Tensor], Any]) -> Iterator[None]:
    """Call see(group name, x) whenever a group's first linear is about to run."""
    handles = [
        model.get_submodule(group.name).register_forward_pre_hook(
            lambda module, args, name=group.name: see(name, args[0])
        )
        for group in block.groups
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Traced:
    calls: list[_Call]
    entering: list[Tensor]
    encoded: Any


def _trace(model: PreTrainedModel, layout: Layout, samples: Samples, *, only_entry: bool) -> _Traced:
    """One pass up to the last block, noting each block's call; or up to the first block only."""
    calls: list[_Call] = []
    entering: list[Tensor] = []
    encoded: list[Any] = []
    left: list[Tensor] = []  # the output of the block before

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], block: Block) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        check_finite(f"the input of {block.name}", hidden)
        if block.is_first:
            entering.append(hidden)
            if only_entry:
                raise _Reached
        elif len(calls) < len(layout.blocks) and not torch.equal(left[-1], hidden):
            raise InputError(
                f"{type(model).__name__} does something between its blocks, before {block.name}; "
                "a model is compressed block by block, each reading what the one before it gives"
            )

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        first, rest = (output[0], tuple(output[1:])) if isinstance(output, tuple | list) else (output, None)
        left[:] = [first]
        kwargs = {name: _kept(value) for name, value in kwargs.items() if name != "hidden_states"}
        calls.append(_Call(_kept(args[1:]), kwargs, None if rest is None else _kept(rest)))
        if len(calls) == len(layout.blocks):  # the head on a whole batch is a large matrix
            raise _Reached

    with ExitStack() as hooks:
        for block in layout.blocks:
            module = model.get_submodule(block.name)
            hooks.callback(
                module.register_forward_pre_hook(partial(enter, block=block), with_kwargs=True).remove
            )
            hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        if layout.stacks > 1:
            encoder = model.get_encoder()
            hooks.callback(
                encoder.register_forward_hook(lambda m, args, output: encoded.append(output)).remove
            )
        with suppress(_Reached):
            run_model(model, samples)
    if not only_entry and len(calls) < len(layout.blocks):
        raise InputError(
            f"{type(model).__name__} runs {len(calls)} of its {len(layout.blocks)} blocks on this input; "
            "nothing is known of the rest"
        )
    return _Traced(calls, entering, encoded[0] if encoded else None)
