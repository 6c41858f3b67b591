"""Which of several processes this is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """Processes that share the batches of one calibration; one alone by default.

    Batches are dealt out by their number in the whole calibration, and what is made of them are sums, so that
    the parts add up to the same whatever the size.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank must be in 0..{self.size - 1}, got {self.rank}")

    def share(self, count: int) -> range:
        """Numbers of the batches, of `count`, that are this process's."""
        return range(self.rank, count, self.size)
