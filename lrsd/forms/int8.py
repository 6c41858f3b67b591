"""Embeddings and head in 8 bit: one scale per token's row."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# Largest code: rows are scaled by their largest magnitude, symmetrically.
_TOP = 127


class Int8Embedding(nn.Module):
    """weight (V, D) int8, scales (V,): row v is weight[v] * scales[v]."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns, dtype=torch.int8), requires_grad=False)
        self.scales = nn.Parameter(torch.zeros(rows, dtype=dtype), requires_grad=False)

    @classmethod
    def pack(cls, weight_VD: Tensor) -> "Int8Embedding":
        """Each row to the nearest multiples of its largest magnitude / 127."""
        packed = cls(weight_VD.shape[0], weight_VD.shape[1], weight_VD.dtype).to(weight_VD.device)
        scales_V = (weight_VD.float().abs().amax(1) / _TOP).to(weight_VD.dtype)
        safe_V = torch.where(scales_V > 0, scales_V, torch.ones_like(scales_V)).float()
        codes_VD = (weight_VD.float() / safe_V[:, None]).round().clamp(-_TOP, _TOP)
        with torch.no_grad():
            packed.scales.copy_(scales_V)
            packed.weight.copy_(codes_VD)
        return packed

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens].to(self.scales.dtype) * self.scales[tokens][..., None]

    def dense_weight(self) -> Tensor:
        """(V, D) in the scales' type."""
        return self.weight.to(self.scales.dtype) * self.scales[:, None]


class Int8Head(nn.Module):
    """The logits of an `Int8Embedding`: its own, or the one that feeds the model, where they are tied."""

    def __init__(self, rows: Int8Embedding, *, tied: bool) -> None:
        super().__init__()
        self.tied = tied
        self._tied_rows: list[Int8Embedding] = [rows] if tied else []  # in a list: no submodule of the head
        if not tied:
            self.weight, self.scales = rows.weight, rows.scales

    def forward(self, x: Tensor) -> Tensor:
        weight, scales = self._stored()
        # They are on the embedding's device, which may be another one than the last block's.
        y = linear(x.to(weight.device), weight.to(x.dtype)) * scales.to(x.dtype)
        return y.to(x.device)

    def dense_weight(self) -> Tensor:
        """(V, D) in the scales' type."""
        weight, scales = self._stored()
        return weight.to(scales.dtype) * scales[:, None]

    def _stored(self) -> tuple[Tensor, Tensor]:
        source = self._tied_rows[0] if self.tied else self
        weight, scales = source.weight, source.scales
        assert isinstance(weight, Tensor)
        assert isinstance(scales, Tensor)
        return weight, scales
