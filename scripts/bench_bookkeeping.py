"""Time that bookkeeping takes for a model of many linear layers: tracing, menus, allocation, ledger,
journal, packing; everything that is not arithmetic on weights.

CPU seconds of one thread. The model is a mixture of experts of Qwen3's kind with weights of 64 x 64, by
default 48 blocks of 128 experts: 12,480 linear layers. Offers are made up, as many as entropy coding makes.
Example:
  python scripts/bench_bookkeeping.py --blocks 48 --experts 128
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from lrsd.forms.base import Shape
from lrsd.forms.entropy import Entropy
from lrsd.forms.layer import Layer, parse_layer
from lrsd.forms.lowrank import LowRank
from lrsd.methods.base import State, Status
from lrsd.model.experts import unfuse_experts
from lrsd.model.kinds import kind_of
from lrsd.model.layout import find_layout
from lrsd.numerics.allocate import allocate_by_weight, allocate_uniform, allocated_bytes, dense_bytes
from lrsd.numerics.menu import Choice, Menu
from lrsd.recipe import Recipe
from lrsd.runtimes.transformers import insert_packed, mark_packed
from lrsd.steps.budget import ByteLedger
from lrsd.steps.fit import Fitted, FittedBlock
from lrsd.work.journal import Journal

_OFFERS = 387


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--blocks", type=int, default=48)
    options.add_argument("--experts", type=int, default=128)
    args = options.parse_args()
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(what: str) -> Iterator[None]:
        start = time.process_time()
        yield
        seconds[what] = time.process_time() - start
        print(f"{what:<28} {seconds[what]:8.2f} s", flush=True)

    config = Qwen3MoeConfig(
        num_hidden_layers=args.blocks, num_experts=args.experts, hidden_size=64, vocab_size=1000,
        moe_intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,  # type: ignore[call-arg]  # Qwen3's own name
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with timed("experts taken apart"):
        unfuse_experts(model)
    with timed("layout"):
        layout = find_layout(model, kind_of(model).example(model))
        names = list(layout.linears)
    print(f"{len(names):,} linear layers", flush=True)
    recipe = Recipe.of(ratio=4)
    with timed("menus"):
        menus = {name: _menu(layout.linears[name].shape) for name in names}
    weights = dict(zip(names, np.random.default_rng(0).lognormal(size=len(names)).tolist(), strict=True))
    budget = dense_bytes(menus) // 4
    with timed("allocation by weight"):
        found = allocate_by_weight(menus, weights, budget, floor=0.3 / 4)
    with timed("allocation, uniform"):
        allocate_uniform(menus, budget)
    assert budget * 0.999 < allocated_bytes(menus, found) <= budget
    with timed("plan and ledger"):
        plan = {name: menus[name].choice(index) for name, index in found.items()}
        blocks = [[s.name for group in block.groups for s in group.linears] for block in layout.blocks]
        shapes = {name: spec.shape for name, spec in layout.linears.items()}
        ledger = ByteLedger(blocks, plan, shapes, recipe.method, budget)
        for index, block in enumerate(blocks):
            ledger.open([index])
            for name in block:
                ledger.limit(name)
                ledger.charge(name, ledger.choice(name).nbytes)
    with (
        TemporaryDirectory() as place,
        closing(Journal(Path(place, "journal"))) as journal,
        timed("journal, written and read"),
    ):
        journal.claim(recipe=recipe.to_dict())
        journal.begin("cpu")
        for index, block in enumerate(blocks):
            layers = {name: _fitted(plan[name], shapes[name]) for name in block}
            journal.finish(f"fit-{index:04d}", FittedBlock(layers))
            journal.read(f"fit-{index:04d}", FittedBlock)
    entries = {name: _entry(shapes[name]).to_dict() for name in names}
    with timed("packed layers put in"):
        insert_packed(model, {name: parse_layer(name, entry) for name, entry in entries.items()})
        mark_packed(model, entries)
    with timed("state and configuration"):
        len(model.state_dict())
        model.config.to_json_string()
    print(f"{'all':<28} {sum(seconds.values()):8.2f} s")


def _menu(shape: Shape) -> Menu:
    rates = np.linspace(0.1, 14, _OFFERS)
    terms = (
        LowRank(np.zeros(_OFFERS, dtype=np.int64)),  # type: ignore[arg-type]  # all offers at once
        Entropy((rates * shape.dense_bytes / 16).astype(int)),  # type: ignore[arg-type]
    )
    nbytes: Any = Layer(terms=terms).nbytes(shape)
    parameters = {"rank": np.zeros(_OFFERS), "step": 2.0**-rates}
    return Menu.of(shape.dense_bytes, nbytes, 4.0**-rates, parameters)


def _entry(shape: Shape) -> Layer:
    return Layer(terms=(Entropy(shape.dense_bytes // 4),))


def _fitted(choice: Choice, shape: Shape) -> Fitted:
    layer = _entry(shape)
    tensors = {
        name: torch.zeros(spec.size, dtype=spec.dtype or torch.bfloat16)
        for name, spec in layer.tensors(shape).items()
    }
    return Fitted(choice, 0.01, 0.0, Status(State.ROUNDED), (), layer.to_dict(), tensors)


if __name__ == "__main__":
    main()
