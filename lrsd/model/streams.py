"""Hidden states on their way through a stack of blocks."""

from collections.abc import Iterable, Iterator

from torch import Tensor


class Stream:
    """Hidden states of all samples in one place of the model, one tensor (batch, seqlen, width) per batch.

    This one holds them in memory; `storage.journal` has one that holds them on disk.
    """

    def __init__(self, batches: Iterable[Tensor] = ()) -> None:
        self._batches = list(batches)

    def append(self, hidden: Tensor) -> None:
        self._batches.append(hidden)

    def __getitem__(self, batch: int) -> Tensor:
        return self._batches[batch]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[batch] for batch in range(len(self)))

    def drop(self) -> None:
        """Forget everything: nobody will read this stream again."""
        self._batches.clear()
