"""What methods are given and what they give."""

from dataclasses import dataclass

from torch import Tensor

from lrsd.model.layout import LinearSpec


@dataclass(frozen=True)
class Perturbation:
    """A layer's weight replaced by an approximation of a known relative output error."""

    spec: LinearSpec
    approximation_OI: Tensor
    error: float
