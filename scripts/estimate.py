"""Memory, disk and time that compressing well-known models is predicted to take, by the preflight's formulas.

No weights are needed: models are made empty from their configurations. Time is that of an accelerator whose
speed is given, by default an A100's, or of the device here (--measure); text, loading and writing are left
out. --check compares the formulas with a run that was made here: its memory and its seconds.
Examples:
  python scripts/estimate.py
  python scripts/estimate.py --memory 24GB --half 165 --single 82 --double 1.3 --copied 16
  python scripts/estimate.py --check out --device cpu
"""

import argparse
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from lrsd.checkpoint.manifest import Manifest, read_manifest
from lrsd.errors import InputError
from lrsd.model.experts import fusions, unfuse_experts
from lrsd.model.kinds import kind_of
from lrsd.model.layout import Block, InputGroup, Layout, LinearSpec, block_names, find_layout
from lrsd.model.load import empty_model, resolve_device
from lrsd.model.samples import Samples
from lrsd.model.slots import weight_slot
from lrsd.model.types import Model
from lrsd.recipe import Recipe
from lrsd.settings import parse_size
from lrsd.steps.estimate import (
    Division,
    ResourceEstimate,
    Speed,
    TimeEstimate,
    count_pass,
    estimate_resources,
    estimate_time,
    per_product,
)
from lrsd.steps.plan import may_propagate
from lrsd.work.residency import Residence

# Those of the published config.json files, as far as weights depend on them.
MODELS: dict[str, PretrainedConfig] = {
    "Llama-3-8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    ),
    "Qwen3-32B": Qwen3Config(
        vocab_size=151936, hidden_size=5120, intermediate_size=25600, num_hidden_layers=64,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    ),
    "Llama-3-70B": LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8,
    ),
    "Mixtral-8x7B": MixtralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
    ),
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, num_experts=128, num_experts_per_tok=8,
        tie_word_embeddings=False, head_dim=128,  # type: ignore[call-arg]  # Qwen3's own name
    ),
    "Qwen3-235B-A22B": Qwen3MoeConfig(
        vocab_size=151936, hidden_size=4096, moe_intermediate_size=1536, num_hidden_layers=94,
        num_attention_heads=64, num_key_value_heads=4, num_experts=128, num_experts_per_tok=8,
        tie_word_embeddings=False, head_dim=128,  # type: ignore[call-arg]  # Qwen3's own name
    ),
}  # fmt: skip
# The same, small enough to be run for the names of its layers and what each reads.
_SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
# NVIDIA A100 80GB PCIe, https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/
# nvidia-a100-datasheet-nvidia-us-2188504-web.pdf: TFLOP/s of float64 and bfloat16 on tensor cores and of
# float32 elsewhere, GB/s of PCIe in one direction, and its memory.
_A100 = {"double": 19.5, "single": 19.5, "half": 312.0, "copied": 32.0, "memory": "80GB"}
# Share of these that products of this size and copies of a layer's weight commonly reach.
_REACHED = 0.5
# GFLOP/s of float64 products that a thread of the host reaches.
_HOST = 30
# Nanoseconds per weight and thread that rounding to entropy-coded columns and coding takes, measured on two
# cores of a Xeon; GB/s of a common solid-state disk.
_ROUNDED, _DISK = 130.0, 2.0
# Bytes of a process that has only loaded its libraries; the same with those of an accelerator.
_LIBRARIES = {False: 550 * 10**6, True: 2500 * 10**6}


class Expected(Residence):
    """What would be in memory if the model's weights were mapped from files; those of fused experts,
    which are taken apart, are copied."""

    def __init__(self, model: Model, *, accelerated: bool, limit: int | None) -> None:
        super().__init__(model, None)
        self.paged, self._accelerated, self._copied = True, accelerated, bool(fusions(model))
        if accelerated:  # meta stands for any accelerator
            self.onload(block_names(model), torch.device("meta"), limit)

    def at_rest(self) -> int:
        weights = sum(parameter.nbytes for parameter in self._model.parameters())
        return _LIBRARIES[self._accelerated] + self._copied * weights

    def _bytes(self, module: torch.nn.Module) -> int:
        return 0 if self._copied else sum(parameter.nbytes for parameter in module.parameters())


def layout_of(model: Model) -> Layout:
    """The layout of an empty model: that of a small one of its kind, with other shapes and more blocks."""
    settings = {**model.config.to_dict(), **{k: v for k, v in _SMALL.items() if hasattr(model.config, k)}}
    settings.pop("layer_types", None)
    small = AutoModelForCausalLM.from_config(type(model.config)(**settings), dtype=torch.bfloat16).eval()
    unfuse_experts(small)
    (first,) = find_layout(small, kind_of(small).example(small)).blocks

    def spec(name: str) -> LinearSpec:
        slot = weight_slot(model, name)
        return LinearSpec(name, slot.shape, slot.module.bias is not None)

    blocks = []
    for number, name in enumerate(block_names(model)):

        def here(other: str, name: str = name) -> str:
            return name + other.removeprefix(first.name)

        groups = tuple(
            InputGroup(tuple(spec(here(s.name)) for s in g.linears), g.routed and here(g.routed), g.repeated)
            for g in first.groups
        )
        blocks.append(Block(name, groups, 0, number == 0))
    return Layout(tuple(blocks), model.config.hidden_size)


def predict(
    model: Model, recipe: Recipe, args: argparse.Namespace, limit: int | None
) -> tuple[ResourceEstimate, ResourceEstimate, TimeEstimate]:
    """With an accelerator, on the host alone, and the time with what `args` say."""
    layout, calibration = layout_of(model), recipe.calibration
    if recipe.method.weighs_tokens:
        layout = layout.one_by_one()
    samples = Samples({"input_ids": torch.zeros(calibration.samples, calibration.seqlen, dtype=torch.int64)})
    linear = sum(spec.shape.dense_bytes for spec in layout.linears.values())
    budget = int(linear / recipe.budget.ratio)
    alone = estimate_resources(
        model, layout, samples, recipe, Expected(model, accelerated=False, limit=None), budget
    )
    needs = estimate_resources(
        model, layout, samples, recipe, Expected(model, accelerated=True, limit=limit), budget
    )
    per_pass = args.per_half * count_pass(model, layout, samples)
    if args.disk:
        streams = 2 * 2 * samples.positions * layout.stream_width * len(layout.blocks)
        per_pass += streams / (args.disk * 1e9)
    division = Division() if limit is None else Division.of(model, needs, limit)
    per_pass += division.brought * sum(p.nbytes for p in model.parameters()) * args.speed.copied
    seconds = estimate_time(model, layout, samples, recipe, args.speed, per_pass, division)
    return needs, alone, seconds


def table(args: argparse.Namespace) -> None:
    limit = parse_size(args.memory)
    print(
        f"{args.ratio:g}x, {args.samples} samples of {args.seqlen} tokens, {args.memory} of device memory\n"
    )
    print("| model | weights | device memory | solved on the host | host memory | disk | time | CPU alone |")
    print("|---|---|---|---|---|---|---|---|")
    recipe = Recipe.of(
        ratio=args.ratio, samples=args.samples, seqlen=args.seqlen, batch=args.batch, bits=args.bits
    )
    for name in args.models or MODELS:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.bfloat16)
            unfuse_experts(model)
        try:
            needs, alone, seconds = predict(model, recipe, args, limit)
        except InputError as error:
            print(f"| {name} | {error} |")
            continue
        total = sum(parameter.nbytes for parameter in model.parameters())
        minutes = seconds.total(propagate=may_propagate(recipe)) / 60
        cells = [
            name,
            f"{total / 1e9:.0f} GB",
            f"{needs.device / 1e9:.0f} GB" + ", too much" * (needs.device > limit),
            "" if needs.widest is None else f"above {needs.widest} inputs",
            *(f"{size / 1e9:.0f} GB" for size in (needs.memory, needs.disk)),
            f"{minutes:,.0f} min",
            f"{alone.memory / 1e9:.0f} GB of memory",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def check(args: argparse.Namespace) -> None:
    """A run that was made here, against what is predicted of it."""
    manifest: Manifest = read_manifest(args.check)
    recipe = Recipe.of(**{name: value for name, value in manifest.recipe.items() if value is not None})
    model = empty_model(args.check, 2**20).bfloat16()
    unfuse_experts(model)
    _, alone, seconds = predict(model, recipe, args, None)
    fit = seconds.fit + seconds.propagate * manifest.propagated
    peak, told = manifest.memory["peak"], manifest.memory["predicted"]
    print(f"| {manifest.base_model} | predicted | measured | ratio |\n|---|---|---|---|")
    for what, predicted, measured, unit in (
        ("memory, by shapes alone, weights paged", alone.memory / 1e9, peak / 1e9, "GB"),
        ("memory, as the run said", told / 1e9, peak / 1e9, "GB"),
        ("calibration pass", seconds.observe, manifest.seconds["observe"], "s"),
        ("fit", fit, manifest.seconds["fit"], "s"),
    ):
        ratio = f"{predicted / measured:.2f}"
        print(f"| {what} | {predicted:.3g} {unit} | {measured:.3g} {unit} | {ratio} |")


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--models", nargs="*", choices=list(MODELS), help="these only")
    options.add_argument("--ratio", type=float, default=4)
    options.add_argument("--bits", default="auto")
    options.add_argument("--samples", type=int, default=128)
    options.add_argument("--seqlen", type=int, default=512)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--memory", default=_A100["memory"], help="of the accelerator (80GB)")
    for name, what in (
        ("double", "TFLOP/s of float64 products"), ("single", "of float32"), ("half", "of 16 bit"),
        ("copied", "GB/s of copies to the accelerator"),
    ):  # fmt: skip
        options.add_argument(f"--{name}", type=float, default=_A100[name], help=f"{what} ({_A100[name]:g})")
    options.add_argument("--reached", type=float, default=_REACHED, help=f"share of these ({_REACHED:g})")
    options.add_argument("--rounded", type=float, default=_ROUNDED, help="ns per weight and thread (130)")
    options.add_argument("--threads", type=int, default=16, help="of the host (16)")
    options.add_argument("--disk", type=float, default=_DISK, help="GB/s of the disk (2)")
    options.add_argument("--measure", action="store_true", help="take the speed of the device here instead")
    options.add_argument("--device", default="auto", help="which one, with --measure or --check")
    options.add_argument("--check", type=Path, default=None, help="result of a run on this machine's CPU")
    args = options.parse_args()
    if args.measure or args.check is not None:
        device = resolve_device(args.device)
        args.speed = Speed.measured(device, rounds=True)
        args.per_half = per_product(torch.bfloat16, device)
    else:
        # Two operations are a multiply-add.
        double, single, args.per_half = (
            2 / (1e12 * args.reached * rate) for rate in (args.double, args.single, args.half)
        )
        rounded, copied = args.rounded * 1e-9 / args.threads, 1 / (1e9 * args.reached * args.copied)
        args.speed = Speed(double, single, rounded, copied, 2e-9 / (_HOST * args.threads))
    if args.check is not None:
        args.disk = 0  # what is written stays in memory for a while
        check(args)
    else:
        table(args)


if __name__ == "__main__":
    main()
