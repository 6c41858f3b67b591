"""Probing: float32 arithmetic without a float32 model, and sensitivities that predict the output's loss."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, PreTrainedModel

from lrsd.data.tokens import token_blocks
from lrsd.forms.base import Shape
from lrsd.methods.base import Probe
from lrsd.model.layout import Block, InputGroup, Layout, LinearSpec, find_layout
from lrsd.model.samples import Samples
from lrsd.model.slots import weight_slot
from lrsd.steps.sensitivity import BlockProbe, in_float32, with_unreached_experts


@pytest.fixture
def model(tiny_model_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.fixture
def tokens(tokenizer, text_file: Path) -> Tensor:
    return token_blocks(tokenizer, text_file.read_text(), samples=2, seqlen=64, seed=0)


@torch.inference_mode()
def test_widened_modules_compute_what_a_float32_copy_does_and_are_narrow_again(
    model: PreTrainedModel, tokens: Tensor
) -> None:
    expected = deepcopy(model).float()(tokens).logits
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    layout = find_layout(model, Samples({"input_ids": tokens}))
    with in_float32(model, layout):
        found = model(tokens).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    assert model(tokens).logits.dtype == torch.bfloat16


@torch.inference_mode()
def test_weights_are_narrow_again_after_a_failure(model: PreTrainedModel, tokens: Tensor) -> None:
    layout = find_layout(model, Samples({"input_ids": tokens}))
    with pytest.raises(IndexError), in_float32(model, layout):
        model(torch.full((1, 4), 10**6))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def perturbed(model: PreTrainedModel, layout: Layout, scale: float) -> dict[str, Probe]:
    """Every weight with noise of this relative size; `error` is its square, which is all that matters."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name in layout.linears:
        W_OI = weight_slot(model, name).read()
        noise = torch.randn(W_OI.shape, generator=generator) * W_OI.std() * scale
        found[name] = Probe(W_OI + noise, scale**2)
    return found


@torch.inference_mode()
def test_shares_of_a_block_add_up_to_the_loss_of_the_block(model: PreTrainedModel, tokens: Tensor) -> None:
    layout = find_layout(model, Samples({"input_ids": tokens}))
    probe = BlockProbe(model, layout, Samples({"input_ids": tokens}))
    exact = deepcopy(model).float()
    reference = log_softmax(exact(tokens).logits, -1)
    for block in layout.blocks:
        probes = perturbed(model, layout, 0.05)
        members = {spec.name: probes[spec.name] for group in block.groups for spec in group.linears}
        measured = probe.measure(members)
        assert set(measured) == set(members)
        probe.advance()
        copy = deepcopy(exact)
        for name, member in members.items():
            weight_slot(copy, name).write(member.W_OI)
        moved = log_softmax(copy(tokens).logits, -1)
        # The probe reads every second token.
        loss = float(kl_div(moved[:, ::2], reference[:, ::2], reduction="sum", log_target=True))
        expected = 2 * loss / tokens.numel()
        assert sum(measured.values()) * 0.05**2 == pytest.approx(expected, rel=1e-3)
        assert min(measured.values()) > 0


@torch.inference_mode()
def test_the_layer_that_moves_the_output_more_gets_more(model: PreTrainedModel, tokens: Tensor) -> None:
    layout = find_layout(model, Samples({"input_ids": tokens}))
    small, large = perturbed(model, layout, 0.01), perturbed(model, layout, 0.1)
    names = [spec.name for group in layout.blocks[0].groups for spec in group.linears]
    for loud in names:
        members = {name: large[name] if name == loud else small[name] for name in names}
        equal = {name: Probe(member.W_OI, 1.0) for name, member in members.items()}
        measured = BlockProbe(model, layout, Samples({"input_ids": tokens})).measure(equal)
        assert max(measured, key=measured.__getitem__) == loud


def test_unreached_experts_get_the_mean_of_their_place_by_their_share_of_tokens() -> None:
    def group(name: str, routed: str | None) -> InputGroup:
        return InputGroup((LinearSpec(name, Shape(4, 4), False),), routed)

    places = {"ups": 4, "downs": 4, "other.ups": 2}
    experts = [(f"{place}.{n}", place) for place, count in places.items() for n in range(count)]
    block = Block("b", (group("q", None), *(group(*expert) for expert in experts)), 0, True)
    measured = {
        "q": 0.0, "ups.0": 3.0, "ups.1": 1.0, "ups.2": 0.0, "ups.3": 0.0, "downs.0": 0.5, "downs.1": 0.0,
        "downs.2": 0.0, "other.ups.0": 0.0, "other.ups.1": 0.0,
    }  # fmt: skip
    routed = dict.fromkeys((name for name, _ in experts), 100) | {"ups.0": 300, "ups.2": 50, "ups.3": 0}
    reached = {"q", "ups.0", "ups.1", "downs.0", "downs.1"}
    found = with_unreached_experts(block, measured, reached, routed)
    # Per token 4 / 400 and 0.5 / 200; downs.1 was reached and does not matter, downs.3 was not probed.
    expected = {"ups.2": 0.5, "ups.3": 0.0, "downs.2": 0.25}
    assert found == pytest.approx(measured | expected)
    assert with_unreached_experts(block, measured, {name for name, _ in experts}, routed) == measured
