"""What a layer offers: bytes and errors as arrays, and what its method needs to make good on an offer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

Numbers = Tensor | np.ndarray | Sequence[float]


@dataclass(frozen=True)
class Choice:
    """One offer of a layer. nbytes: stored, or predicted where only an entropy coder will tell; error: the
    relative output error predicted.

    parameters: what the method made the offer of; None: the weight stays dense. kept: the channels it was
    measured with, ascending, where it keeps any.
    """

    nbytes: int
    error: float = 0.0
    parameters: dict[str, float] | None = None
    kept: Tensor | None = None

    @property
    def is_dense(self) -> bool:
        return self.parameters is None

    def number(self, name: str, default: float = 0) -> float:
        return (self.parameters or {}).get(name, default)

    def count(self, name: str) -> int:
        """A parameter that is a whole number; 0 where the method has none of that name."""
        return int(self.number(name))


@dataclass(frozen=True)
class Menu:
    """The offers of one layer that no other beats: bytes rising, error falling, the dense weight last, even
    where a smaller one errs no more.

    nbytes_N int64, errors_N float64; parameters: of all offers but the dense one, (N - 1,) float64 each;
    sets: kept channels, which the parameter "set" numbers from 1.
    """

    nbytes_N: Tensor
    errors_N: Tensor
    parameters: dict[str, Tensor] = field(default_factory=dict)
    sets: tuple[Tensor, ...] = ()

    @staticmethod
    def of(
        dense_bytes: int,
        nbytes: Numbers = (),
        errors: Numbers = (),
        parameters: Mapping[str, Numbers] | None = None,
        sets: Sequence[Tensor] = (),
    ) -> "Menu":
        """Drop what is dominated, or takes no less than the dense weight; add that one."""
        sizes, lost = np.asarray(nbytes, dtype=np.int64), np.asarray(errors, dtype=np.float64)
        order = np.lexsort((lost, sizes))
        order = order[sizes[order] < dense_bytes]
        best = np.minimum.accumulate(np.append(np.inf, lost[order]))
        order = order[lost[order] < best[:-1]]
        columns = {
            name: torch.from_numpy(np.asarray(values, dtype=np.float64)[order].copy())
            for name, values in (parameters or {}).items()
        }
        return Menu(
            torch.from_numpy(np.append(sizes[order], dense_bytes)),
            torch.from_numpy(np.append(lost[order], 0.0)),
            columns,
            tuple(sets),
        )

    @staticmethod
    def every(
        dense_bytes: int, nbytes: Numbers, errors: Numbers, parameters: Mapping[str, Numbers]
    ) -> "Menu":
        """All of them by bytes, dominated ones too, for a method that chooses by a rule of its own."""
        sizes, lost = np.asarray(nbytes, dtype=np.int64), np.asarray(errors, dtype=np.float64)
        order = np.lexsort((lost, sizes))
        return Menu(
            torch.from_numpy(np.append(sizes[order], dense_bytes)),
            torch.from_numpy(np.append(lost[order], 0.0)),
            {
                name: torch.from_numpy(np.asarray(v, dtype=np.float64)[order])
                for name, v in parameters.items()
            },
        )

    def with_dense_bytes(self, nbytes: int) -> "Menu":
        """The same offers beside a dense weight that takes so many bytes."""
        return Menu.of(nbytes, self.nbytes_N[:-1], self.errors_N[:-1], self.parameters, self.sets)

    def __len__(self) -> int:
        return len(self.nbytes_N)

    @property
    def dense_bytes(self) -> int:
        return int(self.nbytes_N[-1])

    def choice(self, index: int) -> Choice:
        size, error = int(self.nbytes_N[index]), float(self.errors_N[index])
        if index in (-1, len(self) - 1):
            return Choice(size)
        parameters = {name: float(values[index]) for name, values in self.parameters.items()}
        number = int(parameters.pop("set", 0))
        return Choice(size, error, parameters, self.sets[number - 1] if number else None)

    def within(self, nbytes: float) -> int | None:
        """The offer of least error in at most so many bytes; None if there is none."""
        index = int(np.searchsorted(self.nbytes_N.numpy(), nbytes, side="right")) - 1
        return index if index >= 0 else None

    def hull(self, first: int = 0) -> np.ndarray:
        """The lower convex hull of (bytes, error), by index, of the offers from `first` on.

        An offer above the line between two others is no corner of it; these are dropped until there are none.
        """
        kept = np.arange(first, len(self))
        sizes, lost = self.nbytes_N.numpy(), self.errors_N.numpy()
        while len(kept) > 2:
            slopes = np.diff(lost[kept]) / np.diff(sizes[kept])
            corners = np.concatenate([[True], slopes[1:] > slopes[:-1], [True]])
            if corners.all():
                break
            kept = kept[corners]
        return kept


@dataclass(frozen=True)
class TiedMenu:
    """What several layers offer if all must take the same offer: `menu`, and for each of its offers the
    layers' own indices."""

    menu: Menu
    indices: tuple[dict[str, int], ...]

    @staticmethod
    def of(menus: Mapping[str, Menu], weights: Mapping[str, float]) -> "TiedMenu":
        """Offers with the same parameters in all `menus`, and the dense weights. Bytes add up, and errors by
        their weights: the layers' sum of weight x error."""
        known = {}
        for name, menu in menus.items():
            columns = [values.tolist() for values in menu.parameters.values()]
            known[name] = {row: index for index, row in enumerate(zip(*columns, strict=True))}
        first, *others = known.values()
        common = [row for row in first if all(row in other for other in others)]
        offers = [{name: known[name][row] for name in menus} for row in common]
        nbytes = [sum(int(menus[n].nbytes_N[i]) for n, i in offer.items()) for offer in offers]
        errors = [sum(weights[n] * float(menus[n].errors_N[i]) for n, i in offer.items()) for offer in offers]
        dense = sum(menu.dense_bytes for menu in menus.values())
        menu = Menu.of(dense, nbytes, errors, {"offer": list(range(len(offers)))})
        kept = [offers[int(number)] for number in menu.parameters["offer"]]
        return TiedMenu(menu, (*kept, {name: len(menu) - 1 for name, menu in menus.items()}))
