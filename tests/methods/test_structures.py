"""Kinds of S: each is what a layer that is made of it asks for, and auto never loses more than the best."""

from typing import Any

import pytest
import torch
from layers import random_layer
from torch import Tensor

from lrsd.forms.lowrank import LowRank
from lrsd.forms.packed import PackedLinear
from lrsd.methods.base import LayerProblem
from lrsd.methods.lrsd import Lrsd
from lrsd.methods.ssd import Ssd
from lrsd.numerics.menu import Choice, Menu
from lrsd.numerics.metric import Metric

OUT, IN, RANK = 48, 64, 3


def planted(generator: torch.Generator, kind: str) -> Tensor:
    """Low rank, and on top of it large values of one structure."""
    U_OR = torch.randn(OUT, RANK, generator=generator, dtype=torch.float64)
    V_RI = torch.randn(RANK, IN, generator=generator, dtype=torch.float64)
    S_OI = 3 * torch.randn(OUT, IN, generator=generator, dtype=torch.float64)
    chosen = torch.rand(OUT // 8, IN // 8, generator=generator) < 0.2
    masks = {
        "column": torch.rand(1, IN, generator=generator) < 0.2,
        "row": torch.randperm(OUT, generator=generator)[:, None] < 3 * OUT // 8,
        "block": chosen.repeat_interleave(8, 0).repeat_interleave(8, 1),
        "2:4": torch.rand(OUT, IN // 4, 4, generator=generator).argsort(2).flatten(1) < 2,
        "unstructured": torch.rand(OUT, IN, generator=generator) < 0.1,
    }
    return U_OR @ V_RI + S_OI * masks[kind]


def problem_of(W_OI: Tensor, generator: torch.Generator, ratio: float) -> LayerProblem:
    gram_II = random_layer(generator, OUT, IN, "plain").gram
    return LayerProblem(W_OI, Metric(gram_II, damps_by_channel=True), torch.float32, 2 * W_OI.numel() / ratio)


def at_share(menu: Menu, problem: LayerProblem) -> int:
    index = menu.within(problem.share)
    assert index is not None
    return index


PARAMETER = {"column": "columns", "row": "rows", "block": "blocks", "2:4": "fours", "unstructured": "entries"}


@pytest.mark.parametrize("kind", PARAMETER)
def test_a_layer_made_of_a_structure_is_stored_in_it(kind: str, generator: torch.Generator) -> None:
    """Whichever others are asked for too."""
    problem = problem_of(planted(generator, kind), generator, 1.5 if kind == "2:4" else 2.0)
    asked = [kind, "column,row,block,2:4"] if kind != "unstructured" else [kind]
    for structure in asked:
        options: dict[str, Any] = {"bits": "16", "structure": structure, "block_size": 8}
        method = Lrsd(**options)
        menu = method.offer(problem)
        choice = menu.choice(at_share(menu, problem))
        assert choice.count(PARAMETER[kind]), structure
        solution = method.solve(problem, choice)
        assert solution.error < 0.04
        packed = PackedLinear.holding(problem.shape, solution.layer, solution.tensors)
        assert torch.equal(packed.dense_weight(), solution.W_OI)


@pytest.mark.parametrize("kind", PARAMETER)
@pytest.mark.parametrize("ratio", [1.25, 2.0])
def test_several_structures_promise_what_the_best_of_them_does(
    kind: str, ratio: float, generator: torch.Generator
) -> None:
    problem = problem_of(planted(generator, kind), generator, ratio)
    errors = {}
    for structure in (*PARAMETER, ",".join(PARAMETER)):
        menu = Lrsd(bits="16", structure=structure, block_size=8).offer(problem)
        errors[structure] = float(menu.errors_N[at_share(menu, problem)])
    together = errors.pop(",".join(PARAMETER))
    assert together == pytest.approx(min(errors.values()), rel=1e-9)


def test_blocks_and_fours_need_sides_that_they_divide(generator: torch.Generator) -> None:
    """Else the layer has low rank only."""
    layer = random_layer(generator, 20, 30, "plain")
    problem = LayerProblem(layer.W_OI, Metric(layer.gram), torch.float32, 20 * 30.0)
    menu = Lrsd(bits="16", structure="block,2:4", block_size=16).offer(problem)
    assert len(menu) > 1
    assert not menu.parameters["blocks"].any()
    assert not menu.parameters["fours"].any()


@pytest.mark.parametrize("structure", ["column", "row"])
@pytest.mark.parametrize("part", [0.6, 0.75, 0.9])
def test_where_ssd_keeps_of_every_channel_what_it_may_the_rank_takes_what_is_left(
    structure: Any, part: float, generator: torch.Generator
) -> None:
    """And never a byte more than the offer has, whatever the rounds drop."""
    layer = random_layer(generator, OUT, IN, "plain")
    problem = LayerProblem(layer.W_OI, Metric(layer.gram), torch.bfloat16, float(OUT * IN))
    for nbytes in range(int(2 * part * OUT * IN), int(2 * part * OUT * IN) + 40):
        found = Ssd(structure=structure).solve(problem, Choice(nbytes, parameters={"rank": 1.0}))
        assert found.nbytes(problem.shape) <= nbytes
    ranks = [term.rank for term in found.layer.terms if isinstance(term, LowRank)]
    assert ranks[0] > 1
