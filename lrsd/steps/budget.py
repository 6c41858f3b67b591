"""The byte ledger: the sum of all layers lands on the budget although an entropy coder decides what each
takes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from lrsd.forms.base import VALUE_BYTES, Shape
from lrsd.numerics.menu import Choice


class _Adjusts(Protocol):
    def adjusted(self, choice: Choice, bits: float) -> Choice | None: ...


class ByteLedger:
    """What is left for the layers still to come, block by block.

    What a wave of blocks took more or less than planned is shared by the adjustable layers of all blocks
    after it, through a like change of their bits per weight. Within a wave no layer's plan depends on what
    another one took, so that its blocks can be fitted at the same time; but in the last block that has
    adjustable layers, which is a wave of its own, each makes up for those before it, and the last of them is
    fitted to what is left. Linear in the number of layers.
    """

    # How far below what is left the last layer may stay, as a fraction of the whole budget.
    SLACK = 2e-4

    def __init__(
        self,
        blocks: Sequence[Sequence[str]],
        plan: Mapping[str, Choice],
        shapes: Mapping[str, Shape],
        method: _Adjusts,
        budget: int,
    ) -> None:
        """blocks: names of the layers in the order in which they are fitted."""
        self._blocks, self._plan, self._shapes, self._method = blocks, plan, shapes, method
        self.slack = int(self.SLACK * budget)
        adjustable = [n for names in blocks for n in names if method.adjusted(plan[n], 0.0) is not None]
        self._adjustable, self._last = set(adjustable), adjustable[-1] if adjustable else None
        self._weights = sum(self._count(name) for name in adjustable)
        self._planned = sum(choice.nbytes for choice in plan.values())
        self._left, self._bits, self.is_last = budget, 0.0, False

    def waves(self, size: int = 8) -> Iterator[range]:
        """Numbers of the blocks wave by wave: of so many blocks, towards the end of half of what is left, so
        that little is left for the last one to make up for. The same whatever the number of processes."""
        names = [self._last in block for block in self._blocks]
        last = names.index(True) if True in names else len(names) - 1
        start, end = 0, last + 1
        while start < len(names):
            count = min(size, max((end - start + 1) // 2, 1)) if start < end else size
            yield range(start, min(start + count, len(names)))
            start += count

    def open(self, wave: Iterable[int]) -> None:
        """A wave begins: its layers take their part of what those before it left over or overdrew."""
        self.is_last = any(self._last in self._blocks[index] for index in wave)
        self._share()

    def choice(self, name: str) -> Choice:
        """The plan of a layer of this block, adjusted."""
        choice = self._plan[name]
        return self._method.adjusted(choice, self._bits) or choice

    def limit(self, name: str) -> int | None:
        """What is left for this layer if it is the last adjustable one, else None."""
        return self._left - (self._planned - self._plan[name].nbytes) if name == self._last else None

    def charge(self, name: str, nbytes: int) -> None:
        """A layer takes so many bytes."""
        self._planned -= self._plan[name].nbytes
        self._left -= nbytes
        if name in self._adjustable:
            self._weights -= self._count(name)
        if self.is_last:
            self._share()

    def _share(self) -> None:
        """Bits per weight by which the adjustable layers still to come make up for those before them."""
        self._bits = 8 * (self._left - self._planned) / self._weights if self._weights else 0.0

    def _count(self, name: str) -> int:
        return self._shapes[name].dense_bytes // VALUE_BYTES
