"""Moments on disk: those of all layers of a large model do not fit in memory beside it."""

from collections.abc import Iterator, MutableMapping
from itertools import count
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lrsd.errors import InputError
from lrsd.numerics.moments import Moments


class MomentStore(MutableMapping[str, Moments]):
    """Moments by the name of their input group, one safetensors file each; about 2 bytes per entry of G."""

    def __init__(self, directory: Path, device: torch.device | str = "cpu") -> None:
        self._directory, self._device = directory, device
        self._names: dict[str, Path] = {}
        self._numbers = count()

    def __setitem__(self, group: str, moments: Moments) -> None:
        path = self._directory / f"moments-{next(self._numbers):05d}.safetensors"
        try:
            save_file({name: tensor.cpu() for name, tensor in moments.state().items()}, path)
        except SafetensorError as error:
            raise InputError(
                f"cannot write the moments of {group} to {self._directory} ({error}); they take about two "
                "bytes per entry of every group's covariance"
            ) from error
        self._names[group] = path

    def __getitem__(self, group: str) -> Moments:
        return Moments.from_state(load_file(self._names[group]), self._device)

    def __delitem__(self, group: str) -> None:
        self._names.pop(group).unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
