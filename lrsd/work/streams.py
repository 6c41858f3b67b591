"""Hidden states on their way through a stack of blocks."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrsd.errors import CheckpointError
from lrsd.work.files import refusals, sync


class Stream:
    """Hidden states of all samples in one place of the model, one tensor (batch, seqlen, width) per batch.

    This one holds them in memory; `storage.journal` has one that holds them on disk.
    """

    def __init__(self, batches: Iterable[Tensor] = ()) -> None:
        self._batches = dict(enumerate(batches))

    def append(self, hidden: Tensor) -> None:
        self.put(len(self), hidden)

    def put(self, batch: int, hidden: Tensor) -> None:
        self._batches[batch] = hidden

    def __getitem__(self, batch: int) -> Tensor:
        return self._batches[batch]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[batch] for batch in range(len(self)))

    def drop(self) -> None:
        """Forget everything: nobody will read this stream again."""
        self._batches.clear()


class Leading(Stream):
    """The first `count` batches of another stream, to be read."""

    def __init__(self, stream: Stream, count: int) -> None:
        super().__init__()
        self._stream, self._count = stream, count

    def __getitem__(self, batch: int) -> Tensor:
        return self._stream[batch]

    def __len__(self) -> int:
        return self._count


class StreamOnDisk(Stream):
    """Hidden states of which no more is in memory than is in use; one safetensors file per batch."""

    def __init__(self, directory: Path, device: torch.device | str) -> None:
        super().__init__()
        self._directory, self._device = directory, device
        self._own: list[int] = []

    def put(self, batch: int, hidden: Tensor) -> None:
        with refusals(self._directory):
            self._directory.mkdir(exist_ok=True)
            save_file({"hidden": hidden.cpu().contiguous()}, self._path(batch))
        self._own.append(batch)

    def __getitem__(self, batch: int) -> Tensor:
        try:
            with safe_open(self._path(batch), framework="pt") as file:
                # A copy: products may differ in their last bits with a tensor's place in memory.
                return file.get_tensor("hidden").to(self._device, copy=True)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._path(batch)} cannot be read: {error}") from error

    def __len__(self) -> int:
        """Of all processes."""
        return len(list(self._directory.glob("*.safetensors"))) if self._directory.is_dir() else 0

    def sync(self) -> None:
        """Have what this process has put there on disk before going on."""
        with refusals(self._directory):
            for batch in self._own:
                sync(self._path(batch))
            if self._own:
                sync(self._directory)

    def drop(self) -> None:
        if self._directory.is_dir():
            shutil.rmtree(self._directory)
        self._own.clear()

    def _path(self, batch: int) -> Path:
        return self._directory / f"{batch:05d}.safetensors"
