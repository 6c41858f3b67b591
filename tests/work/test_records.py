"""Records of any size come back as they were."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lrsd.work.records import read_record, write_record


@dataclass(frozen=True)
class Offers:
    menus: dict[str, list[float]]
    grams: dict[str, Tensor]


def test_a_record_of_hundreds_of_experts_is_read_again(tmp_path: Path) -> None:
    """As JSON it has more than the 100 MB that safetensors reads of a header."""
    numbers = [index / 7 for index in range(1000)]
    record = Offers(
        {f"layers.3.experts.{expert}.up_proj{part}": numbers for expert in range(640) for part in range(9)},
        {"layers.3.experts.0.up_proj": torch.arange(3.0)},
    )
    write_record(tmp_path / "record.safetensors", record)
    assert (tmp_path / "record.safetensors").stat().st_size > 10**8
    found = read_record(tmp_path / "record.safetensors", Offers)
    assert found.menus == record.menus
    assert torch.equal(found.grams["layers.3.experts.0.up_proj"], torch.arange(3.0))
