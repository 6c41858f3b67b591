"""Second moments: sums that merge in any order and equal a direct computation."""

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
import torch

from lrsd.errors import SolverError
from lrsd.numerics.moments import CrossMoments, Moments, energy, grain

# Partial products are float32: relative to the largest entry they are good to a few times 1e-7.
FLOAT32 = 2e-6


def moments_of(x: torch.Tensor) -> Moments:
    moments = Moments(x.shape[-1])
    moments.update_(x)
    return moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 3, 7, 64])
def test_moments_equal_direct_float64_computation(
    generator: torch.Generator, width: int, dtype: torch.dtype
) -> None:
    x = (torch.randn(2, 50, width, generator=generator) + 0.5).to(dtype)
    moments, tokens = moments_of(x), x.reshape(-1, width).double()
    direct = tokens.T @ tokens / len(tokens)
    assert moments.count == 100
    assert moments.gram.dtype == torch.float64
    torch.testing.assert_close(moments.gram, direct, rtol=0, atol=FLOAT32 * float(direct.abs().max()))
    torch.testing.assert_close(moments.mean, tokens.mean(0), rtol=FLOAT32, atol=FLOAT32)
    assert torch.equal(moments.gram, moments.gram.T)


def test_moments_merge_in_any_order(generator: torch.Generator) -> None:
    shards = [torch.randn(n, 9, generator=generator) for n in (1, 20, 300)]
    whole = moments_of(torch.cat(shards))
    for a, b, c in permutations(moments_of(shard) for shard in shards):
        for merged in ((a + b) + c, a + (b + c), Moments(9) + a + b + c):
            assert merged.count == whole.count
            torch.testing.assert_close(merged.gram, whole.gram, rtol=FLOAT32, atol=FLOAT32)
            torch.testing.assert_close(merged.mean, whole.mean, rtol=FLOAT32, atol=FLOAT32)


def test_merging_changes_neither_part(generator: torch.Generator) -> None:
    a, b = (moments_of(torch.randn(5, 4, generator=generator)) for _ in range(2))
    before = a.gram.clone()
    merged = a + b
    merged.update_(torch.ones(3, 4))
    assert torch.equal(a.gram, before)
    assert (a.count, b.count) == (5, 5)


def test_small_shards_do_not_drift_from_one_large_one(generator: torch.Generator) -> None:
    """Sums are float64: ten thousand updates lose nothing against one."""
    x = torch.randn(10_000, 3, generator=generator)
    streamed = Moments(3)
    for token in x:
        streamed.update_(token)
    direct = x.double().T @ x.double() / len(x)
    torch.testing.assert_close(streamed.gram, direct, rtol=1e-7, atol=1e-8)


def test_cross_moments_equal_direct_computation_and_merge(generator: torch.Generator) -> None:
    t = torch.randn(4, 30, 5, generator=generator).bfloat16()
    x = torch.randn(4, 30, 7, generator=generator).bfloat16()
    parts = [CrossMoments(5, 7) for _ in range(4)]
    for part, t_TO, x_TI in zip(parts, t, x, strict=True):
        part.update_(t_TO, x_TI)
    direct = torch.einsum("bto,bti->oi", t.double(), x.double()) / 120
    for order in permutations(parts):
        merged = sum(order[1:], order[0])
        torch.testing.assert_close(merged.mean, direct, rtol=FLOAT32, atol=FLOAT32)
        torch.testing.assert_close(merged.target_mean, t.double().mean((0, 1)), rtol=FLOAT32, atol=FLOAT32)


def test_energy_is_the_mean_squared_norm_of_the_output(generator: torch.Generator) -> None:
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    W = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    expected = (x @ W.T).square().sum(1).mean()
    assert energy(W, x.T @ x / 40) == pytest.approx(float(expected), rel=1e-12)


def test_stored_moments_come_back_to_float32(generator: torch.Generator) -> None:
    for width in (5, 9):
        found = moments_of(torch.randn(50, width, generator=generator))
        moments = Moments.from_state(found.state())
        assert moments.count == 50
        torch.testing.assert_close(moments.gram, found.gram, rtol=1e-6, atol=1e-6)
        assert torch.equal(moments.gram, moments.gram.T)
        assert torch.equal(moments.mean, found.mean)


class Elsewhere(torch.Tensor):
    """A tensor as if on an accelerator without float64: refuses that type, and tensors that are not there."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.Tensor.to and isinstance(args[1], torch.device):
                return args[0].as_subclass(torch.Tensor)
            if any(isinstance(value, torch.Tensor) and not isinstance(value, cls) for value in args):
                raise RuntimeError("expected all tensors to be on the same device")
            result = func(*args, **(kwargs or {}))
            if not isinstance(result, torch.Tensor):
                return result
            if result.dtype == torch.float64:
                raise TypeError("no float64 on this device")
            return result.as_subclass(cls)


def test_sums_stay_exact_where_the_tokens_device_has_no_float64(generator: torch.Generator) -> None:
    """The same bits as on one device: products float32 there, sums float64 here."""
    x, t = (torch.randn(3, 40, width, generator=generator).bfloat16() for width in (9, 5))
    with pytest.raises(RuntimeError, match="same device"):
        torch.zeros(3, 40, 9).add_(x.as_subclass(Elsewhere))
    with pytest.raises(TypeError, match="no float64"):
        x.as_subclass(Elsewhere).double()
    here, there = Moments(9), Moments(9)
    cross_here, cross_there = CrossMoments(5, 9), CrossMoments(5, 9)
    for x_TI, t_TO in zip(x, t, strict=True):
        here.update_(x_TI)
        cross_here.update_(t_TO, x_TI)
        there.update_(x_TI.as_subclass(Elsewhere))
        cross_there.update_(t_TO.as_subclass(Elsewhere), x_TI.as_subclass(Elsewhere))
    assert torch.equal(here.gram, there.gram)
    assert torch.equal(here.mean, there.mean)
    assert torch.equal(cross_here.mean, cross_there.mean)
    assert torch.equal(cross_here.target_mean, cross_there.target_mean)


def test_all_tokens_move_as_a_part_of_them_does(generator: torch.Generator) -> None:
    """By a linear map, or not at all; weights and counts stay those of all."""
    x_TI = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    weights_T = torch.rand(400, generator=generator)

    def moments(x_TI: torch.Tensor, weights_T: torch.Tensor) -> Moments:
        found = Moments(5)
        found.update_(x_TI, weights_T)
        return found

    whole, part = moments(x_TI, weights_T), moments(x_TI[:100], weights_T[:100])
    map_II = torch.randn(5, 5, generator=generator, dtype=torch.float64).tril() + 3 * torch.eye(5)
    for moved_TI in (x_TI, 2 * x_TI, x_TI @ map_II.T):
        expected, after = moments(moved_TI, weights_T), moments(moved_TI[:100], weights_T[:100])
        found = whole.moved(part, after)
        torch.testing.assert_close(found.gram, expected.gram, rtol=1e-3, atol=1e-3)
        assert (found.count, found.weight) == (whole.count, whole.weight)
        torch.testing.assert_close(found.mean, whole.mean + after.mean - part.mean)
        assert whole.moved(whole, expected) is expected


def test_no_direction_becomes_negative_however_the_part_moved(generator: torch.Generator) -> None:
    """What the part has by chance beyond the others is not taken from these when it vanishes."""
    x_TI = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    x_TI[:40, 2] *= 3
    after_TI = x_TI[:40].clone()
    after_TI[:, 2] *= 1e-3
    moved = moments_of(x_TI).moved(moments_of(x_TI[:40]), moments_of(after_TI))
    assert float(torch.linalg.eigvalsh(moved.gram).min()) > 0
    assert float(moved.gram[2, 2]) < 1e-2
    nothing = moments_of(torch.zeros(40, 5))
    assert not moments_of(x_TI).moved(nothing, nothing).gram.isnan().any()
    with pytest.raises(SolverError):
        moments_of(x_TI).moved(moments_of(x_TI[:40]), moments_of(after_TI * torch.nan))


def test_sums_are_the_same_bytes_whoever_adds_what(generator: torch.Generator) -> None:
    """With channels and tokens thousands of times the others, as models have them, and dead channels."""
    scales_B = [1.0, 300.0, 1e-3, 7.0, 0.1, 1.0, 40.0, 1e-2]
    batches = [scale * torch.randn(32, 24, generator=generator) for scale in scales_B]
    for number, x in enumerate(batches):
        x[:, 0] *= 300
        x[:, 1] *= 1e-3
        x[:, 2] = 0
        x[0, 3] = 3e4 if number % 3 == 0 else 0.0
        x[:, 4] *= float(number > 0)  # dead in the first batch
    weights = [torch.rand(32, generator=generator) * 3 for _ in batches]
    targets = [x[:, :5] * 1e-2 + torch.randn(32, 5, generator=generator) for x in batches]
    grain_I, grain_O = grain(batches[0]), grain(targets[0])

    def sums(order: Sequence[int], processes: int) -> tuple[Moments, CrossMoments]:
        parts = [(Moments(24), CrossMoments(5, 24)) for _ in range(processes)]
        for place, number in enumerate(order):
            moments, cross = parts[place % processes]
            moments.update_(batches[number], weights[number], grain_I)
            cross.update_(targets[number], batches[number], weights[number], (grain_O, grain_I))
        whole, whole_cross = parts[0]
        for moments, cross in parts[1:]:
            whole, whole_cross = whole + moments, whole_cross + cross
        return whole, whole_cross

    expected, expected_cross = sums(range(8), 1)
    for order, processes in (((7, 3, 5, 1, 0, 2, 6, 4), 1), (range(8), 2), ((4, 6, 2, 0, 1, 5, 3, 7), 3)):
        found, found_cross = sums(order, processes)
        assert found.weight == expected.weight
        assert torch.equal(found.gram, expected.gram)
        assert torch.equal(found.mean, expected.mean)
        assert torch.equal(found_cross.mean, expected_cross.mean)
        assert torch.equal(found_cross.target_mean, expected_cross.target_mean)
    direct = sum(
        (x.double() * w.double()[:, None]).T @ x.double() for x, w in zip(batches, weights, strict=True)
    )
    level_I = direct.diagonal().clamp(min=1e-30).sqrt()
    off = (found.gram * found.weight - direct).abs() / (level_I[:, None] * level_I).clamp(min=1e-9)
    assert float(off.max()) < FLOAT32, divmod(int(off.argmax()), 24)
