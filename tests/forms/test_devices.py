"""Embedding and head may be on two devices: tried on tensors that have a device and no data, and refuse to
meet those of another one."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lrsd.forms.int8 import Int8Embedding, Int8Head

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_where_its_rows_are(tied: bool) -> None:
    with FakeTensorMode():
        with FIRST:
            head = Int8Head(Int8Embedding(20, 8, torch.bfloat16), tied=tied)
        y = head(torch.empty(3, 8, dtype=torch.bfloat16, device=SECOND))
    assert (y.device, y.shape) == (SECOND, (3, 20))
