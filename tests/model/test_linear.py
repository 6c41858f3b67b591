"""The packed layer computes what the decomposition says, from the values it says."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from layers import random_layer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lrsd.errors import CheckpointError
from lrsd.forms.base import Shape
from lrsd.forms.packed import PackedLinear
from lrsd.model.slots import dense_linear
from lrsd.numerics.allocate import LayerPlan
from lrsd.numerics.rounding import EntropyCodes, GroupCodes, HessianFactor, round_ecsq, round_groupwise
from lrsd.numerics.solver import (
    Decomposition,
    columns_plus_codes,
    decompose,
    decompose_coded,
    decompose_thresholded,
)

Rounding = Callable[[torch.Tensor, HessianFactor], EntropyCodes | GroupCodes]

OUT, IN = 19, 13  # odd, so that the bit mask does not end on a byte
PLANS = {
    "low rank": LayerPlan(5),
    "columns": LayerPlan(4, columns=3),
    "rows": LayerPlan(4, rows=3),
    "thresholded": LayerPlan(4, columns=5, entries=41),
    "unstructured": LayerPlan(4, columns=IN, entries=41),
    "unpivoted": LayerPlan(4, columns=3, pivoted=False),
    "unpivoted rows": LayerPlan(4, rows=3, pivoted=False),
    "columns only": LayerPlan(0, columns=3),
    "rows only": LayerPlan(0, rows=3),
    "nothing": LayerPlan(0),
    "full rank": LayerPlan(IN),
    "full rank beside columns": LayerPlan(IN - 3, columns=3),
    "full rank beside rows": LayerPlan(OUT - 10, rows=10),
    "no entries": LayerPlan(4, columns=5, entries=0),
}
CODES: dict[str, tuple[LayerPlan, Rounding]] = {
    "entropy coded": (LayerPlan(0), partial(round_ecsq, step=0.02)),
    "entropy coded beside low rank": (LayerPlan(3), partial(round_ecsq, step=0.05)),
    "large codes": (LayerPlan(0), partial(round_ecsq, step=1e-5)),
    "nothing but zeros": (LayerPlan(0), partial(round_ecsq, step=1e3)),
    "3 bit": (LayerPlan(0), partial(round_groupwise, bits=3, group=5)),
    "8 bit beside columns": (LayerPlan(0, columns=3), partial(round_groupwise, bits=8, group=64)),
    "2 bit beside both": (LayerPlan(2, columns=2), partial(round_groupwise, bits=2, group=4)),
}
every_coding = pytest.mark.parametrize(("plan", "rounding"), CODES.values(), ids=CODES.keys())
every_kind = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
with_or_without_bias = pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])


def solved(generator: torch.Generator, plan: LayerPlan) -> Decomposition:
    layer = random_layer(generator, OUT, IN)
    counts = {"rank": plan.rank, "columns": plan.columns}
    if plan.entries is not None:
        return decompose_thresholded(layer.W_OI, layer.gram, **counts, entries=plan.entries)
    return decompose(layer.W_OI, layer.gram, **counts, rows=plan.rows)


def bias_of(generator: torch.Generator, with_bias: bool) -> torch.Tensor | None:
    return torch.randn(OUT, generator=generator, dtype=torch.float64) if with_bias else None


@every_kind
@with_or_without_bias
def test_packed_forward_equals_the_dense_product(
    generator: torch.Generator, plan: LayerPlan, with_bias: bool
) -> None:
    found, bias_O = solved(generator, plan), bias_of(generator, with_bias)
    x = torch.randn(2, 7, IN, generator=generator, dtype=torch.float64)
    expected = x @ found.dense().T + (bias_O if bias_O is not None else 0)
    packed = PackedLinear.pack(found, plan, bias_O, torch.float32)
    torch.testing.assert_close(packed(x.float()), expected.float(), rtol=1e-5, atol=1e-5)


@every_kind
@with_or_without_bias
@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
def test_dense_module_computes_what_the_packed_one_does(
    generator: torch.Generator, plan: LayerPlan, with_bias: bool, transposed: bool
) -> None:
    bias_O = bias_of(generator, with_bias)
    packed = PackedLinear.pack(solved(generator, plan), plan, bias_O, torch.float32, transposed=transposed)
    dense = dense_linear(packed, torch.float32)
    x = torch.randn(6, IN, generator=generator)
    assert isinstance(dense, Conv1D if transposed else nn.Linear)
    torch.testing.assert_close(dense(x), packed(x), rtol=1e-5, atol=1e-5)


@every_kind
def test_bfloat16_forward_is_off_by_rounding_only(generator: torch.Generator, plan: LayerPlan) -> None:
    """Each of a handful of summed terms is rounded to 8 bits, so 2^-7 of the output's scale bounds them."""
    packed = PackedLinear.pack(solved(generator, plan), plan, None, torch.bfloat16)
    x = torch.randn(50, IN, generator=generator).bfloat16()
    expected = x.float() @ packed.dense_weight().T
    assert packed(x).dtype == torch.bfloat16
    difference = (packed(x).float() - expected).square().mean().sqrt()
    assert float(difference) <= 2**-7 * float(expected.square().mean().sqrt())


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packing_rounds_each_value_once(
    generator: torch.Generator, plan: LayerPlan, dtype: torch.dtype
) -> None:
    """Kept channels and entries are the solver's own values, cast; so are the pivot rows of L."""
    found, bias_O = solved(generator, plan), bias_of(generator, True)
    packed = PackedLinear.pack(found, plan, bias_O, dtype)
    expected = {
        "bias": bias_O,
        "columns": found.columns_K,
        "rows": found.rows_P,
        "row_values": found.row_values_PI,
    }
    if found.mask_OK is not None:
        expected["entries"] = found.column_values_OK[found.mask_OK]
    else:
        expected["column_values"] = found.column_values_OK
    if packed.pivots is not None:
        # Only to double rounding, 2^-8 in bfloat16: the solver never forms the rows of L.
        torch.testing.assert_close(
            packed.weight.double(), (found.U_FR @ found.V_RC)[packed.pivots.long()], rtol=2**-8, atol=1e-9
        )
    for name, value in expected.items():
        parameter = getattr(packed, name)
        assert value is not None
        if parameter is not None:
            assert torch.equal(parameter, value.to(parameter.dtype)), name
        else:
            assert value.numel() == 0 or name == "columns", name


@every_kind
def test_state_dict_alone_restores_the_layer(generator: torch.Generator, plan: LayerPlan) -> None:
    packed = PackedLinear.pack(solved(generator, plan), plan, None, torch.bfloat16)
    restored = PackedLinear(Shape(OUT, IN), packed.layout, torch.bfloat16)
    restored.load_state_dict(packed.state_dict())
    x = torch.randn(3, IN, generator=generator).bfloat16()
    assert torch.equal(restored(x), packed(x))


def test_a_loader_that_does_not_know_the_layer_fails_on_its_shape(generator: torch.Generator) -> None:
    """No packed `weight` has the dense shape, whatever the plan, so it cannot be mistaken for one."""
    for plan in PLANS.values():
        packed = PackedLinear.pack(solved(generator, plan), plan, None, torch.float32)
        assert packed.weight.shape != (OUT, IN)


def coded(generator: torch.Generator, plan: LayerPlan, rounding: Rounding) -> Decomposition:
    layer = random_layer(generator, OUT, IN)
    beside = columns_plus_codes(layer.W_OI, layer.gram, plan.columns)
    return decompose_coded(layer.W_OI, layer.gram, rounding, *beside, rank=plan.rank, iterations=2)


@every_coding
def test_codes_decode_to_the_very_values_that_the_solver_saw(
    generator: torch.Generator, plan: LayerPlan, rounding: Rounding
) -> None:
    found = coded(generator, plan, rounding)
    packed = PackedLinear.pack(found, plan, None, torch.bfloat16)
    assert torch.equal(packed.integer_codes().int(), found.codes.codes_OI.int())
    if not plan.rank and not plan.columns:
        assert torch.equal(packed.dense_weight(), found.codes.dense())
    in_float = PackedLinear.pack(found, plan, None, torch.float32)
    torch.testing.assert_close(in_float.dense_weight(), found.dense().float(), rtol=1e-4, atol=1e-6)


@every_coding
@pytest.mark.parametrize("tokens", [1, 40])
def test_coded_forward_equals_the_dense_product(
    generator: torch.Generator, plan: LayerPlan, rounding: Rounding, tokens: int
) -> None:
    found = coded(generator, plan, rounding)
    x = torch.randn(1, tokens, IN, generator=generator)
    packed = PackedLinear.pack(found, plan, None, torch.float32)
    expected = x @ packed.dense_weight().T
    torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-5)
    packed = PackedLinear.pack(found, plan, None, torch.bfloat16)
    scale = float(expected.square().mean().sqrt())
    torch.testing.assert_close(packed(x.bfloat16()).float(), expected, rtol=0.02, atol=0.03 * scale + 1e-6)


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 100])
@pytest.mark.parametrize("shape", [(64, 128), (192, 64), (128, 320)])
def test_the_kernel_for_few_tokens_computes_what_the_dense_product_does(
    generator: torch.Generator, shape: tuple[int, int], tokens: int
) -> None:
    layer = random_layer(generator, *shape)
    rounding = partial(round_ecsq, step=0.02)
    beside = columns_plus_codes(layer.W_OI, layer.gram, 0)
    found = decompose_coded(layer.W_OI, layer.gram, rounding, *beside)
    packed = PackedLinear.pack(found, LayerPlan(0), None, torch.bfloat16)
    x = torch.randn(2, tokens, shape[1], generator=generator).bfloat16()
    expected = x.float() @ packed.dense_weight().T
    scale = float(expected.square().mean().sqrt())
    torch.testing.assert_close(packed(x).float(), expected, rtol=0.02, atol=0.03 * scale)


def test_a_damaged_stream_is_named_not_run(generator: torch.Generator) -> None:
    plan, rounding = CODES["entropy coded"]
    packed = PackedLinear.pack(coded(generator, plan, rounding), plan, None, torch.float32)
    packed.codes[0] = 77
    with pytest.raises(CheckpointError, match="damaged"):
        packed(torch.zeros(1, IN))
