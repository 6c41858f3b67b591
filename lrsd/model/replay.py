"""Run a model block by block on cached hidden states, looking at the inputs of its linears."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrsd.model.layout import Block, Layout

# Hidden states of a batch of samples, one tensor (batch, seqlen, width) per batch.
Stream = list[Tensor]


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a hook to leave a forward pass as soon as it has what it came for."""


@dataclass(frozen=True)
class Replay:
    """The blocks of one model, each callable on cached hidden states.

    What a block is called with besides hidden states (rotary embeddings, masks) depends on the
    batch shape only, since samples are unpadded, so it is recorded once per batch size.
    """

    model: PreTrainedModel
    layout: Layout
    arguments: dict[tuple[int, int], list[dict[str, Any]]]
    tuple_output: bool = False

    @staticmethod
    def start(model: PreTrainedModel, layout: Layout, batches: Sequence[Tensor]) -> tuple["Replay", Stream]:
        """The replay and the hidden states that enter the first block, for token batches (B, T)."""
        arguments: dict[tuple[int, int], list[dict[str, Any]]] = {}
        stream: Stream = []
        tuple_output = False
        for tokens in batches:
            tokens = tokens.to(model.device)
            shape = (tokens.shape[0], tokens.shape[1])
            if shape not in arguments:
                arguments[shape], tuple_output = _record_arguments(model, layout, tokens)
            stream.append(_first_input(model, layout, tokens))
        return Replay(model, layout, arguments, tuple_output), stream

    def block(self, index: int) -> nn.Module:
        return self.model.get_submodule(self.layout.blocks[index].name)

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Output of one block for one batch of hidden states."""
        output = self.block(index)(hidden, **self.arguments[hidden.shape[0], hidden.shape[1]][index])
        return output[0] if isinstance(output, tuple) else output

    def run_with_inputs(self, index: int, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Output of one block and the input of each of its groups, by group name."""
        inputs: dict[str, Tensor] = {}
        with _on_input(self.model, self.layout.blocks[index], inputs.__setitem__):
            return self.run(index, hidden), inputs

    def input_of(self, index: int, group: str, hidden: Tensor) -> Tensor:
        """Input of one group of a block; what comes after it in the block is not run."""
        inputs: dict[str, Tensor] = {}

        def stop(name: str, x: Tensor) -> None:
            if name == group:
                inputs[name] = x
                raise _Reached

        with _on_input(self.model, self.layout.blocks[index], stop), suppress(_Reached):
            self.run(index, hidden)
        return inputs[group]

    def adds_to_output(self, index: int, linear: str, hidden: Tensor) -> bool:
        """Whether the block's output contains this linear's output one to one (residual stream).

        Tried, not assumed: the linear's output is shifted and the block's output has to follow.
        """
        hidden = hidden[:1]
        key = (1, hidden.shape[1])
        if key not in self.arguments:
            full = next(arguments for shape, arguments in self.arguments.items() if shape[1] == key[1])
            self.arguments[key] = [
                {name: _first_sample(value) for name, value in block.items()} for block in full
            ]
        plain = self.run(index, hidden).float()
        shift = plain.abs().mean()
        module = self.model.get_submodule(linear)
        handle = module.register_forward_hook(lambda m, args, output: output + shift.to(output.dtype))
        try:
            moved = self.run(index, hidden).float() - plain
        finally:
            handle.remove()
        # 16-bit rounding of the shifted sum allows no more than a few per cent of the shift.
        return bool((moved - shift).abs().median() < 0.05 * shift)

    def logits_from(self, index: int, tokens: Tensor, hidden: Tensor, every: int = 1) -> Tensor:
        """Logits when block `index` reads `hidden`, float32; the model's own code runs what follows.

        every: only those of every so many tokens, which spares most of the head.
        """
        kept = torch.arange(0, hidden.shape[1], every, device=hidden.device)

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (hidden, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": hidden}

        handle = self.block(index).register_forward_pre_hook(enter, with_kwargs=True)
        try:
            with self._skipped(index):
                tokens = tokens.to(self.model.device)
                if "logits_to_keep" in signature(self.model.forward).parameters:
                    return self.model(tokens, use_cache=False, logits_to_keep=kept).logits.float()
                return self.model(tokens, use_cache=False).logits[:, kept].float()
        finally:
            handle.remove()

    @contextmanager
    def _skipped(self, count: int) -> Iterator[None]:
        """The first `count` blocks hand their input through, for as long as the context lasts."""
        blocks = [self.block(index) for index in range(count)]
        for block in blocks:
            block.forward = self._hand_through
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    def _hand_through(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states,) if self.tuple_output else hidden_states


def _first_sample(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_first_sample(item) for item in value)
    return value[:1] if isinstance(value, Tensor) and value.dim() > 1 else value


@contextmanager
def _on_input(model: nn.Module, block: Block, see: Any) -> Iterator[None]:
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


def _record_arguments(
    model: PreTrainedModel, layout: Layout, tokens: Tensor
) -> tuple[list[dict[str, Any]], bool]:
    recorded: list[dict[str, Any]] = []
    tuple_output = False

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal tuple_output
        recorded.append({k: v for k, v in kwargs.items() if k != "hidden_states"})
        tuple_output = isinstance(output, tuple)
        if len(recorded) == len(layout.blocks):  # the head on a whole batch is a large matrix
            raise _Reached

    handles = [
        model.get_submodule(block.name).register_forward_hook(record, with_kwargs=True)
        for block in layout.blocks
    ]
    try:
        with suppress(_Reached):
            model(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return recorded, tuple_output


def _first_input(model: PreTrainedModel, layout: Layout, tokens: Tensor) -> Tensor:
    found: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    first = model.get_submodule(layout.blocks[0].name)
    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with suppress(_Reached):
            model(tokens, use_cache=False)
    finally:
        handle.remove()
    return found[0]
