"""Blocks are laid out as llama.cpp reads them: its own package takes them apart to the same values."""

import numpy as np
import pytest
import torch
from blocks import random_blocks
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from lrsd.forms.base import Shape
from lrsd.forms.ggml import BLOCK_TYPES, Ggml, packed_blocks

every_type = pytest.mark.parametrize("kind", BLOCK_TYPES)


@every_type
def test_the_engines_package_reads_the_same_values(kind: str, generator: torch.Generator) -> None:
    for _ in range(4):
        codes = random_blocks(kind, generator)
        blocks = packed_blocks(kind, codes).numpy()
        values = torch.from_numpy(dequantize(blocks, GGMLQuantizationType[kind]))
        torch.testing.assert_close(values, codes.dense(), rtol=1e-5, atol=1e-6)


@every_type
def test_number_and_sizes_are_the_engines(kind: str) -> None:
    found, number = BLOCK_TYPES[kind], GGMLQuantizationType[kind]
    assert found.number == int(number)
    assert (found.grid.block, found.nbytes) == GGML_QUANT_SIZES[number]
    assert Ggml(found.number).nbytes(Shape(3, 512)) == 3 * 512 // found.grid.block * found.nbytes


def test_a_type_that_is_not_known_and_rows_that_are_no_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="number 999"):
        Ggml(999)
    form = Ggml(BLOCK_TYPES["Q4_K"].number)
    with pytest.raises(ValueError, match="blocks of 256, there are 320"):
        form.check({"blocks": torch.zeros(1, 144, dtype=torch.uint8)}, Shape(1, 320))


def test_a_product_is_that_of_the_dense_matrix(generator: torch.Generator) -> None:
    codes = random_blocks("Q6_K", generator)
    form, tensors = Ggml.of("Q6_K", codes)
    x = torch.randn(3, 512, generator=generator)
    torch.testing.assert_close(
        form.forward(tensors, x, Shape(5, 512)), x @ codes.dense().T, rtol=1e-4, atol=1e-3
    )
    assert tensors["blocks"].numpy().dtype == np.uint8
