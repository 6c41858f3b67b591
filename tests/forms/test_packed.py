"""The packed layer computes what the decomposition says, from the values it says."""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from layers import RandomLayer, random_layer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lrsd.errors import CheckpointError
from lrsd.forms.base import Shape
from lrsd.forms.kernels import joined_integers, split_integers, split_product, whole_integers
from lrsd.forms.layer import assemble
from lrsd.forms.packed import PackedLinear
from lrsd.forms.trellis import Trellis
from lrsd.methods import coded, low_rank_sparse
from lrsd.methods.base import LayerProblem, Solution
from lrsd.methods.supports import sparse_of
from lrsd.model.slots import dense_linear
from lrsd.numerics.menu import Choice
from lrsd.numerics.metric import Metric
from lrsd.numerics.rounding import round_entropy_coded, round_groupwise
from lrsd.numerics.solver import (
    Decomposition,
    columns_plus_codes,
    decompose,
    decompose_coded,
    decompose_sparse,
)

OUT, IN = 19, 13  # odd, so that the bit mask does not end on a byte
Parameters = dict[str, float]
PLANS: dict[str, Parameters] = {
    "low rank": {"rank": 5},
    "columns": {"rank": 4, "columns": 3},
    "rows": {"rank": 4, "rows": 3},
    "unstructured": {"rank": 0, "entries": 41},
    "unstructured plus low rank": {"rank": 4, "entries": 41},
    "unpivoted": {"rank": 4, "columns": 3, "pivoted": 0},
    "unpivoted rows": {"rank": 4, "rows": 3, "pivoted": 0},
    "columns only": {"rank": 0, "columns": 3},
    "rows only": {"rank": 0, "rows": 3},
    "every column": {"rank": 0, "columns": IN},
    "nothing": {"rank": 0},
    "full rank": {"rank": IN},
    "full rank plus columns": {"rank": IN - 3, "columns": 3},
    "full rank plus rows": {"rank": OUT - 10, "rows": 10},
}
CODES: dict[str, Parameters] = {
    "entropy coded": {"step": 0.02, "states": 64},
    "plain grid": {"step": 0.02, "states": 1},
    "entropy coded plus low rank": {"rank": 3, "step": 0.05, "states": 64},
    "large codes": {"step": 1e-5, "states": 64},
    "nothing but zeros": {"step": 1e3, "states": 64},
    "3 bit": {"bits": 3, "group": 5},
    "8 bit plus columns": {"columns": 3, "bits": 8, "group": 64},
    "2 bit plus both": {"rank": 2, "columns": 2, "bits": 2, "group": 4},
}
every_coding = pytest.mark.parametrize("parameters", CODES.values(), ids=CODES.keys())
every_kind = pytest.mark.parametrize("parameters", PLANS.values(), ids=PLANS.keys())
with_or_without_bias = pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])


def solved(layer: RandomLayer, parameters: Parameters) -> Decomposition:
    counts = {name: int(parameters.get(name, 0)) for name in ("rank", "columns")}
    if (sparse := sparse_of(Choice(0, parameters=parameters))) is not None:
        return decompose_sparse(layer.W_OI, Metric(layer.gram), sparse, rank=counts["rank"], iterations=5)
    return decompose(layer.W_OI, layer.gram, **counts, rows=int(parameters.get("rows", 0)))


def stored(
    layer: RandomLayer, parameters: Parameters, dtype: torch.dtype, bias_O: torch.Tensor | None = None
) -> Solution:
    """The same solution as it is stored."""
    problem = LayerProblem(layer.W_OI, Metric(layer.gram), dtype, 0.0, bias_O=bias_O)
    return low_rank_sparse.solve(problem, Choice(0, parameters=parameters), iterations=5)


def packed_linear(solution: Solution, *, transposed: bool = False) -> PackedLinear:
    layer = replace(solution.layer, transposed=transposed)
    return PackedLinear.holding(Shape(*solution.W_OI.shape), layer, solution.tensors)


def bias_of(generator: torch.Generator, with_bias: bool) -> torch.Tensor | None:
    return torch.randn(OUT, generator=generator, dtype=torch.float64) if with_bias else None


@every_kind
@with_or_without_bias
def test_packed_forward_equals_the_dense_product(
    generator: torch.Generator, parameters: Parameters, with_bias: bool
) -> None:
    layer, bias_O = random_layer(generator, OUT, IN), bias_of(generator, with_bias)
    x = torch.randn(2, 7, IN, generator=generator, dtype=torch.float64)
    expected = x @ solved(layer, parameters).dense().T + (bias_O if bias_O is not None else 0)
    packed = packed_linear(stored(layer, parameters, torch.float32, bias_O))
    torch.testing.assert_close(packed(x.float()), expected.float(), rtol=1e-5, atol=1e-5)


@every_kind
@with_or_without_bias
@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
def test_dense_module_computes_what_the_packed_one_does(
    generator: torch.Generator, parameters: Parameters, with_bias: bool, transposed: bool
) -> None:
    layer, bias_O = random_layer(generator, OUT, IN), bias_of(generator, with_bias)
    packed = packed_linear(stored(layer, parameters, torch.float32, bias_O), transposed=transposed)
    dense = dense_linear(packed, torch.float32)
    x = torch.randn(6, IN, generator=generator)
    assert isinstance(dense, Conv1D if transposed else nn.Linear)
    torch.testing.assert_close(dense(x), packed(x), rtol=1e-5, atol=1e-5)


@every_kind
def test_bfloat16_forward_is_off_by_rounding_only(generator: torch.Generator, parameters: Parameters) -> None:
    """Each of a handful of summed terms is rounded to 8 bits, so 2^-7 of the output's scale bounds them."""
    packed = packed_linear(stored(random_layer(generator, OUT, IN), parameters, torch.bfloat16))
    x = torch.randn(50, IN, generator=generator).bfloat16()
    expected = x.float() @ packed.dense_weight().T
    assert packed(x).dtype == torch.bfloat16
    difference = (packed(x).float() - expected).square().mean().sqrt()
    assert float(difference) <= 2**-7 * float(expected.square().mean().sqrt())


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packing_rounds_each_value_once(
    generator: torch.Generator, parameters: Parameters, dtype: torch.dtype
) -> None:
    """Kept channels and entries are the solver's own values, cast; so are the pivot rows of L."""
    layer, bias_O = random_layer(generator, OUT, IN), bias_of(generator, True)
    found, tensors = solved(layer, parameters), stored(layer, parameters, dtype, bias_O).tensors
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
    if "pivots" in tensors:
        # Only to double rounding, 2^-8 in bfloat16: the solver never forms the rows of L.
        torch.testing.assert_close(
            tensors["weight"].double(),
            (found.U_FR @ found.V_RC)[tensors["pivots"].long()],
            rtol=2**-8,
            atol=1e-9,
        )
    for name, value in expected.items():
        assert value is not None
        if name in tensors:
            assert tensors[name].dtype == (torch.int16 if name in ("columns", "rows") else dtype)
            assert torch.equal(tensors[name], value.to(tensors[name].dtype)), name
        else:
            assert value.numel() == 0 or (name == "columns" and value.numel() == IN), name


@every_kind
def test_state_dict_alone_restores_the_layer(generator: torch.Generator, parameters: Parameters) -> None:
    packed = packed_linear(stored(random_layer(generator, OUT, IN), parameters, torch.bfloat16))
    restored = PackedLinear(Shape(OUT, IN), packed.layer, torch.bfloat16)
    restored.load_state_dict(packed.state_dict())
    x = torch.randn(3, IN, generator=generator).bfloat16()
    assert torch.equal(restored(x), packed(x))


@pytest.mark.parametrize("parameters", [*PLANS.values(), *CODES.values()], ids=[*PLANS, *CODES])
def test_a_loader_that_does_not_know_the_layer_fails_on_its_shape(
    generator: torch.Generator, parameters: Parameters
) -> None:
    """No packed `weight` has the dense shape, whatever the plan, so it cannot be mistaken for one; and the
    layer's own shape follows from its tensors."""
    layer = random_layer(generator, OUT, IN)
    store = rounded if parameters in CODES.values() else stored
    solution = store(layer, parameters, torch.float32)
    assert solution.tensors["weight"].shape != (OUT, IN)
    assert solution.layer.shape(solution.tensors) == Shape(OUT, IN)


def rounded(layer: RandomLayer, parameters: Parameters, dtype: torch.dtype) -> Solution:
    problem = LayerProblem(layer.W_OI, Metric(layer.gram), dtype, 0.0)
    return coded.solve(problem, Choice(0, parameters=parameters), iterations=2)


def decomposed(layer: RandomLayer, parameters: Parameters) -> Decomposition:
    metric = Metric(layer.gram)
    if "step" in parameters:
        rounding = partial(round_entropy_coded, step=parameters["step"], states=int(parameters["states"]))
    else:
        bits, group = int(parameters["bits"]), int(parameters["group"])
        rounding = partial(round_groupwise, bits=bits, group=group)
    kept = columns_plus_codes(layer.W_OI, metric, int(parameters.get("columns", 0)))
    rank = int(parameters.get("rank", 0))
    return decompose_coded(layer.W_OI, layer.gram, rounding, *kept, rank=rank, iterations=2)


@every_coding
def test_codes_decode_to_the_very_values_that_the_solver_saw(
    generator: torch.Generator, parameters: Parameters
) -> None:
    layer = random_layer(generator, OUT, IN)
    found = decomposed(layer, parameters)
    assert found.codes is not None
    packed = packed_linear(rounded(layer, parameters, torch.bfloat16))
    held, states = packed.decoded()[-1], int(parameters.get("states", 1))
    assert torch.equal(whole_integers(held, states).int(), found.codes.codes_OI.int())
    if not found.rank and not found.columns_K.numel():
        assert torch.equal(packed.dense_weight(), found.codes.dense())
    in_float = packed_linear(rounded(layer, parameters, torch.float32))
    torch.testing.assert_close(in_float.dense_weight(), found.dense().float(), rtol=1e-4, atol=1e-6)


@every_coding
@pytest.mark.parametrize("tokens", [1, 40])
def test_coded_forward_equals_the_dense_product(
    generator: torch.Generator, parameters: Parameters, tokens: int
) -> None:
    layer = random_layer(generator, OUT, IN)
    x = torch.randn(1, tokens, IN, generator=generator)
    packed = packed_linear(rounded(layer, parameters, torch.float32))
    expected = x @ packed.dense_weight().T
    torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-5)
    packed = packed_linear(rounded(layer, parameters, torch.bfloat16))
    scale = float(expected.square().mean().sqrt())
    torch.testing.assert_close(packed(x.bfloat16()).float(), expected, rtol=0.02, atol=0.03 * scale + 1e-6)


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 100])
@pytest.mark.parametrize("shape", [(64, 128), (192, 64), (128, 320)])
def test_the_kernel_for_few_tokens_computes_what_the_dense_product_does(
    generator: torch.Generator, shape: tuple[int, int], tokens: int
) -> None:
    packed = packed_linear(
        rounded(random_layer(generator, *shape), {"step": 0.02, "states": 64}, torch.bfloat16)
    )
    x = torch.randn(2, tokens, shape[1], generator=generator).bfloat16()
    expected = x.float() @ packed.dense_weight().T
    scale = float(expected.square().mean().sqrt())
    torch.testing.assert_close(packed(x).float(), expected, rtol=0.02, atol=0.03 * scale)


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("coding", ["entropy coded", "plain grid"])
def test_coded_layers_are_compiled_whole_and_differentiated(
    generator: torch.Generator, coding: str, tokens: int
) -> None:
    packed = packed_linear(rounded(random_layer(generator, OUT, IN), CODES[coding], torch.float32))
    packed.load_state_dict(packed.state_dict())  # decoded from its stream
    packed.requires_grad_(False)
    x = torch.randn(tokens, IN, generator=generator, requires_grad=True)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    expected = x @ packed.dense_weight().T
    torch.testing.assert_close(compiled(x.detach()), expected, rtol=1e-4, atol=1e-5)
    y = packed(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn(y.shape, generator=generator)
    (found,) = torch.autograd.grad((y * weights).sum(), x)
    torch.testing.assert_close(found, weights @ packed.dense_weight(), rtol=1e-4, atol=1e-5)


@every_coding
def test_a_layer_is_the_same_without_what_it_was_decoded_from(
    generator: torch.Generator, parameters: Parameters
) -> None:
    """It computes, is saved, copied, moved and loaded as before."""
    packed = packed_linear(rounded(random_layer(generator, OUT, IN), parameters, torch.bfloat16))
    x = torch.randn(3, IN, generator=generator).bfloat16()
    before, state = packed(x), {name: t.clone() for name, t in packed.state_dict().items()}
    packed.release_encoded()
    assert packed.codes.numel() == 0
    for layer in (packed, deepcopy(packed), deepcopy(packed).to("cpu")):
        assert torch.equal(layer(x), before)
        found = layer.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    other = packed_linear(rounded(random_layer(generator, OUT, IN), parameters, torch.bfloat16))
    if not any(other.state_dict()[name].shape != tensor.shape for name, tensor in state.items()):
        other.release_encoded()
        other.load_state_dict(state)
        assert torch.equal(other(x), before)
    packed.load_state_dict(state)
    assert torch.equal(packed(x), before)


def test_a_few_large_integers_do_not_widen_the_others(generator: torch.Generator) -> None:
    codes_OI = torch.randint(-127, 128, (6, 9), generator=generator, dtype=torch.int32)
    assert [*split_integers(codes_OI)] == ["codes"]
    assert split_integers(codes_OI)["codes"].dtype == torch.int8
    for value, dtype in ((128, torch.int16), (70_000, torch.int32)):
        codes_OI[2, 4] = value
        loaded = split_integers(codes_OI)
        assert (loaded["codes"].dtype, loaded["wide_codes"].dtype) == (torch.int8, dtype)
        assert loaded["wide"].tolist() == [4]
        assert torch.equal(joined_integers(loaded).int(), codes_OI)
        x = torch.randn(5, 9, generator=generator)
        torch.testing.assert_close(split_product(x, loaded), x @ codes_OI.float().T)
    codes_OI[0] = 500
    assert split_integers(codes_OI)["codes"].dtype == torch.int32


@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_a_product_is_the_same_of_inputs_that_lie_otherwise_in_memory(
    generator: torch.Generator, tokens: int
) -> None:
    """As Zamba gives them, transposed; eight tokens at most are multiplied by torch's kernel for int8."""
    loaded = split_integers(torch.randint(-7, 8, (128, 64), generator=generator))
    x = torch.randn(2, 64, tokens, generator=generator).bfloat16()[:1].transpose(1, 2)
    assert torch.equal(split_product(x, loaded), split_product(x.contiguous(), loaded))


def test_a_damaged_stream_is_named_not_run(generator: torch.Generator) -> None:
    solution = rounded(random_layer(generator, OUT, IN), CODES["entropy coded"], torch.float32)
    packed = packed_linear(solution)
    packed.codes[0] = 77
    with pytest.raises(CheckpointError, match=f"trellis part of a {OUT} x {IN} layer.*damaged"):
        packed(torch.zeros(1, IN))


@pytest.mark.parametrize(("step", "most"), [(0.3, 9), (0.02, 13), (3e-4, 17), (1e-6, 33)])
def test_large_integers_take_no_more_than_their_own_width_in_memory(
    step: float, most: float, generator: torch.Generator
) -> None:
    """At low ratios codes have ten bits and more: not in lists of exceptions, then."""
    W_OI = torch.randn(96, 128, generator=generator)
    codes = round_entropy_coded(W_OI, Metric(torch.eye(128).double()).factor, step)
    form, tensors = Trellis.of(codes, None)
    layer, stored_as = assemble(Shape(96, 128), [(form, tensors)], {}, torch.bfloat16)
    packed = PackedLinear(Shape(96, 128), layer, torch.bfloat16)
    packed.load_state_dict(stored_as)
    packed.release_encoded()
    assert 8 * packed.resident_bytes() / W_OI.numel() < most
    torch.testing.assert_close(packed.dense_weight(), codes.dense(), rtol=1e-6, atol=0)
    x = torch.randn(3, 128, generator=generator)
    torch.testing.assert_close(packed(x), x @ codes.dense().T, rtol=1e-4, atol=1e-3)
    assert torch.equal(packed.state_dict()["codes"], stored_as["codes"])
