"""The vLLM plugin against a stub of vLLM's interface: what a layer computes is what transformers computes.

The stub has the signatures and the loading of vLLM's main branch (layers/linear.py of commit 0036d38), for
any tensor parallel size as far as the refusal goes, and neither attention nor kernels.
"""

import importlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from recipes import on
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from lrsd.compress import compress
from lrsd.errors import CheckpointError
from lrsd.forms.lowrank import LowRank
from lrsd.forms.packed import PackedLinear
from lrsd.recipe import Recipe
from lrsd.settings import Calibration

# ------------------------------------------------------------------------------------------ stub of vLLM

_tp_size = 1
_methods: dict[str, type] = {}
QUANTIZATION_METHODS = ["awq", "gptq"]


def register_quantization_config(quantization: str) -> Callable[[type], type]:
    """As up to vLLM 0.10: a second registration raises; later versions warn and overwrite."""

    def wrapper(cls: type) -> type:
        if quantization in QUANTIZATION_METHODS:
            raise ValueError(f"The quantization method `{quantization}` is already exists.")
        if not issubclass(cls, QuantizationConfig):
            raise ValueError("The quantization config must be a subclass of `QuantizationConfig`.")
        _methods[quantization] = cls
        QUANTIZATION_METHODS.append(quantization)
        return cls

    return wrapper


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


def set_weight_attrs(weight: Tensor, weight_attrs: dict[str, Any]) -> None:
    for key, value in weight_attrs.items():
        assert not hasattr(weight, key), f"Overwriting existing tensor attribute: {key}"
        setattr(weight, key, value)


class LinearMethodBase:
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        return


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype,
        **extra_weight_attrs,
    ) -> None:  # fmt: skip
        weight = torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype)
        layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
        set_weight_attrs(layer.weight, {"input_dim": 1, "output_dim": 0, **extra_weight_attrs})

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, layer.weight, bias)


class LinearBase(nn.Module):
    """All of vLLM's linears in one: they differ here in what is split, and in the names of the shards."""

    shard_ids: tuple[int | str, ...] = ()

    def __init__(
        self, input_size: int, output_sizes: list[int], *, bias: bool = False,
        quant_config: Any = None, prefix: str = "", split_input: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.input_size, self.output_sizes, self.output_size = input_size, output_sizes, sum(output_sizes)
        self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
        if self.quant_method is None:
            raise ValueError("All linear layers should support quant method.")
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=input_size // _tp_size if split_input else input_size,
            output_partition_sizes=[n if split_input else n // _tp_size for n in output_sizes],
            input_size=input_size,
            output_size=self.output_size,
            params_dtype=torch.get_default_dtype(),
            weight_loader=self.weight_loader,
        )
        # After create_weights, whatever that registered: a method cannot own a parameter named bias.
        self.register_parameter("bias", nn.Parameter(torch.empty(self.output_size)) if bias else None)
        if bias:
            set_weight_attrs(self.bias, {"output_dim": 0, "weight_loader": self.weight_loader})

    def weight_loader(self, param: nn.Parameter, loaded_weight: Tensor, loaded_shard_id=None) -> None:
        data = param.data
        if loaded_shard_id is not None:
            index = self.shard_ids.index(loaded_shard_id)
            data = data.narrow(param.output_dim, sum(self.output_sizes[:index]), self.output_sizes[index])
        assert data.shape == loaded_weight.shape
        data.copy_(loaded_weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.quant_method.apply(self, x, self.bias), None


class QKVParallelLinear(LinearBase):
    shard_ids = ("q", "k", "v")


class MergedColumnParallelLinear(LinearBase):
    shard_ids = (0, 1)


class ColumnParallelLinear(LinearBase):
    pass


class RowParallelLinear(LinearBase):
    def __init__(self, *sizes: Any, **options: Any) -> None:
        super().__init__(*sizes, split_input=True, **options)


def plant(root: nn.Module, name: str, module: nn.Module) -> None:
    """Add a submodule under a dotted name, whatever is missing in between too."""
    for part in (path := name.split("."))[:-1]:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.add_module(path[-1], module)


class Llama(nn.Module):
    """The linears of vLLM's `LlamaForCausalLM`, and its `load_weights`."""

    block = "model.layers.{}"
    packed_modules_mapping = {  # noqa: RUF012 - as vLLM has it
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    stacked_params_mapping = (
        (".qkv_proj", ".q_proj", "q"),
        (".qkv_proj", ".k_proj", "k"),
        (".qkv_proj", ".v_proj", "v"),
        (".gate_up_proj", ".gate_proj", 0),
        (".gate_up_proj", ".up_proj", 1),
    )

    def __init__(self, config: Any, quant_config: Any) -> None:
        super().__init__()
        quant_config.packed_modules_mapping = self.packed_modules_mapping
        for number in range(config.num_hidden_layers):
            for leaf, (kind, inputs, outputs, bias) in self.linears(config).items():
                name = f"{self.block.format(number)}.{leaf}"
                plant(self, name, kind(inputs, outputs, bias=bias, quant_config=quant_config, prefix=name))

    @staticmethod
    def linears(config: Any) -> dict[str, tuple[type[LinearBase], int, list[int], bool]]:
        hidden, inner = config.hidden_size, config.intermediate_size
        keys = hidden // config.num_attention_heads * config.num_key_value_heads
        return {
            "self_attn.qkv_proj": (QKVParallelLinear, hidden, [hidden, keys, keys], False),
            "self_attn.o_proj": (RowParallelLinear, hidden, [hidden], False),
            "mlp.gate_up_proj": (MergedColumnParallelLinear, hidden, [inner, inner], False),
            "mlp.down_proj": (RowParallelLinear, inner, [hidden], False),
        }

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        params = dict(self.named_parameters())
        for name, loaded_weight in weights:
            for param_name, weight_name, shard_id in self.stacked_params_mapping:
                if weight_name in name:
                    param = params[name.replace(weight_name, param_name)]
                    param.weight_loader(param, loaded_weight, shard_id)
                    break
            else:
                params[name].weight_loader(params[name], loaded_weight)


class MappedLlama(Llama):
    """Loads as vLLM does since 0.25: the shard is an attribute of the tensor, and fused layers load
    themselves."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, loaded_weight in weights:
            for param_name, weight_name, shard_id in self.stacked_params_mapping:
                if weight_name in name:
                    name = name.replace(weight_name, param_name)
                    loaded_weight.shard_id = shard_id
            path, _, kind = name.rpartition(".")
            layer = self.get_submodule(path)
            param = getattr(layer, kind, layer)
            if isinstance(layer, QKVParallelLinear | MergedColumnParallelLinear):
                param.weight_loader(param, loaded_weight, getattr(loaded_weight, "shard_id", None))
            else:
                param.weight_loader(param, loaded_weight)


class GPT2(Llama):
    """q, k and v are one tensor on disk; weights of Conv1D are turned around on loading."""

    block = "transformer.h.{}"
    packed_modules_mapping = {}  # noqa: RUF012 - as vLLM has it

    @staticmethod
    def linears(config: Any) -> dict[str, tuple[type[LinearBase], int, list[int], bool]]:
        hidden = config.hidden_size
        return {
            "attn.c_attn": (QKVParallelLinear, hidden, [hidden] * 3, True),
            "attn.c_proj": (RowParallelLinear, hidden, [hidden], True),
            "mlp.c_fc": (ColumnParallelLinear, hidden, [4 * hidden], True),
            "mlp.c_proj": (RowParallelLinear, 4 * hidden, [hidden], True),
        }

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        super().load_weights((n, w.t() if n.endswith(".weight") else w) for n, w in weights)


STUBS = {
    "vllm.model_executor.layers.linear": (LinearBase, LinearMethodBase, UnquantizedLinearMethod),
    "vllm.model_executor.layers.quantization.base_config": (QuantizationConfig,),
    "vllm.model_executor.utils": (set_weight_attrs,),
    "vllm.model_executor.layers.quantization": (register_quantization_config,),
}


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`lrsd.runtimes.vllm`, imported as if vLLM were installed, and registered."""
    for path, members in STUBS.items():
        names = path.split(".")
        for depth in range(1, len(names) + 1):
            name = ".".join(names[:depth])
            monkeypatch.setitem(sys.modules, name, sys.modules.get(name) or ModuleType(name))
        for member in members:
            setattr(sys.modules[path], member.__name__, member)
    QUANTIZATION_METHODS[:] = ["awq", "gptq"]
    _methods.clear()
    sys.modules["vllm.model_executor.layers.quantization"].QUANTIZATION_METHODS = QUANTIZATION_METHODS
    module = importlib.import_module("lrsd.runtimes.vllm")
    module.register()
    yield module
    del sys.modules["lrsd.runtimes.vllm"]


# ------------------------------------------------------------------------------------------- checkpoints

QUICK = "entropy and rank"  # in the fast loop
MODES: dict[str, dict[str, Any]] = {
    "columns": {"bits": "16", "ratio": 1.6, "structure": "column"},
    "rows": {"bits": "16", "ratio": 1.6, "structure": "row"},
    "bitmask": {"bits": "16", "ratio": 1.6, "structure": "unstructured"},
    "entropy": {"ratio": 4},
    "entropy and rank": {"ratio": 2, "rank": 5},
    "fixed widths": {"coding": "fixed", "ratio": 3},
}
# Part of a fused layer, all of one, and a layer of its own.
LEFT_DENSE = ("0.self_attn.k_proj", "1.mlp.gate_proj", "1.mlp.up_proj", "1.self_attn.o_proj")


def compressed(base: Path, text_file: Path, directory: Path, **settings: Any) -> Path:
    calibration = Calibration(calib=str(text_file), samples=8, seqlen=32)
    settings = {"allocation": "uniform", "propagate": False, **settings}
    compress(str(base), directory, on(Recipe.of(**settings), calibration))
    return directory


def leave_dense(directory: Path, base: Path, names: Iterable[str]) -> None:
    """The checkpoint as if the plan had left these layers as they were."""
    config = json.loads((directory / "config.json").read_text())
    shard = directory / "model.safetensors"
    tensors, dense = load_file(shard), load_file(base / "model.safetensors")
    for name in names:
        del config["quantization_config"]["layers"][name]
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{name}.")}
        tensors[f"{name}.weight"] = dense[f"{name}.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name == QUICK else pytest.mark.slow) for name in MODES],
    ids=lambda name: name.replace(" ", "-"),
)
def checkpoint(
    request: pytest.FixtureRequest,
    tiny_model_dir: Path,
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    directory = tmp_path_factory.mktemp("vllm") / "out"
    compressed(tiny_model_dir, text_file, directory, **MODES[request.param])
    leave_dense(directory, tiny_model_dir, [f"model.layers.{name}" for name in LEFT_DENSE])
    return directory


@pytest.fixture(scope="module")
def entropy(tiny_model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small checkpoint for the refusals; the first k_proj is dense."""
    directory = compressed(tiny_model_dir, text_file, tmp_path_factory.mktemp("vllm") / "out", ratio=4)
    leave_dense(directory, tiny_model_dir, ["model.layers.0.self_attn.k_proj"])
    return directory


def linear_tensors(directory: Path) -> dict[str, Tensor]:
    """All but embeddings, norms and head, in the order of the file."""
    tensors = load_file(directory / "model.safetensors")
    return {n: t for n, t in tensors.items() if "proj" in n or "c_attn" in n or "c_fc" in n}


def quantization_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def build(kind: type[Llama], packing: dict[str, Any], config: Any) -> Llama:
    """What vLLM does with a checkpoint before it reads tensors."""
    quant_config = _methods[packing["quant_method"]].from_config(packing)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return kind(config, quant_config)
    finally:
        torch.set_default_dtype(default)


def finish(model: Llama) -> None:
    for module in model.modules():
        if isinstance(method := getattr(module, "quant_method", None), LinearMethodBase):
            method.process_weights_after_loading(module)


def served(kind: type[Llama], directory: Path) -> tuple[Llama, PreTrainedModel]:
    """The same checkpoint in the stub and in transformers."""
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    model = build(kind, quantization_config(directory), reference.config)
    model.load_weights(linear_tensors(directory).items())
    finish(model)
    return model, reference


def stored_names(model: Llama, name: str) -> list[str]:
    parent, _, leaf = name.rpartition(".")
    return [f"{parent}.{part}" for part in model.packed_modules_mapping.get(leaf, [leaf])]


def inputs(layer: LinearBase, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, layer.input_size, generator=generator).to(torch.bfloat16)


@torch.inference_mode()
def assert_same_outputs(model: Llama, reference: PreTrainedModel) -> None:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LinearBase)}
    assert len(layers) == 8
    for name, layer in layers.items():
        names = stored_names(model, name)
        for tokens in (1, 20):  # torch's kernel for few tokens, and the dense product
            x = inputs(layer, tokens)
            expected = torch.cat([reference.get_submodule(part)(x) for part in names], dim=-1)
            found, _ = layer(x)
            if isinstance(layer.quant_method, UnquantizedLinearMethod):
                torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6, msg=name)
            else:
                assert torch.equal(found, expected), name


# ------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("kind", [Llama, MappedLlama])
def test_every_layer_computes_what_it_computes_in_transformers(
    plugin: ModuleType, checkpoint: Path, kind: type[Llama]
) -> None:
    model, reference = served(kind, checkpoint)
    assert_same_outputs(model, reference)
    methods = {n: type(m.quant_method) for n, m in model.named_modules() if isinstance(m, LinearBase)}
    plain = {name for name, method in methods.items() if method is UnquantizedLinearMethod}
    assert plain == {"model.layers.1.mlp.gate_up_proj", "model.layers.1.self_attn.o_proj"}
    q, k, v = model.get_submodule("model.layers.0.self_attn.qkv_proj.lrsd").parts
    assert [type(part) for part in (q, k, v)] == [PackedLinear, nn.Linear, PackedLinear]


def test_tensors_may_come_in_any_order(plugin: ModuleType, entropy: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(entropy, dtype=torch.bfloat16).eval()
    model = build(Llama, quantization_config(entropy), reference.config)
    model.load_weights(reversed(linear_tensors(entropy).items()))
    finish(model)
    assert_same_outputs(model, reference)


def test_conv1d_weights_fused_on_disk_and_a_bias_that_is_added_once(
    plugin: ModuleType, make_model, text_file: Path, tmp_path: Path
) -> None:
    config = GPT2Config(
        vocab_size=300, n_positions=64, n_embd=48, n_layer=2, n_head=4, initializer_range=0.2,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    directory = compressed(make_model(config), text_file, tmp_path / "out", rank=5, ratio=3)
    model, reference = served(GPT2, directory)
    packed = reference.get_submodule("transformer.h.0.attn.c_attn")
    assert isinstance(packed, PackedLinear)
    assert packed.layer.terms[0] == LowRank(5)  # a weight of rank 0 has nothing to turn around
    assert packed.layer.transposed
    assert packed.bias.detach().abs().min() > 0
    assert_same_outputs(model, reference)


def test_compiles_into_one_graph_and_holds_codes_once(plugin: ModuleType, checkpoint: Path) -> None:
    """vLLM compiles with fullgraph=True: whatever decodes or depends on values must be over by then."""
    if "unstructured" in json.loads((checkpoint / "recipe.json").read_text()).values():
        pytest.skip("its bitmask is expanded at every product")
    model, _ = served(Llama, checkpoint)
    for number in range(2):
        layer = model.get_submodule(f"model.layers.{number}.self_attn.qkv_proj")
        x = inputs(layer, 20)
        torch._dynamo.mark_dynamic(x, 0)  # as vLLM does
        torch.compiler.reset()
        graph = torch.compile(lambda x, layer=layer: layer(x)[0], fullgraph=True, backend="eager")
        assert torch.equal(graph(x), layer(x)[0])
    parts = [part for part in model.modules() if isinstance(part, PackedLinear)]
    assert parts
    for part in parts:
        stream = dict(part.named_parameters()).get("codes")
        assert stream is None or stream.numel() == 0


@pytest.mark.parametrize(
    "missing", ["0.self_attn.q_proj.codes", "0.self_attn.k_proj.weight", "1.mlp.down_proj.steps"]
)
def test_a_missing_tensor_is_named(plugin: ModuleType, entropy: Path, tiny_llama, missing: str) -> None:
    model = build(Llama, quantization_config(entropy), tiny_llama())
    tensors = linear_tensors(entropy)
    del tensors[f"model.layers.{missing}"]
    model.load_weights(tensors.items())
    with pytest.raises(CheckpointError, match=rf"lacks model\.layers\.{missing};"):
        finish(model)


@pytest.mark.parametrize("wrong", ["shape", "kind", "shard"])
def test_a_tensor_that_fits_nowhere_is_refused(
    plugin: ModuleType, entropy: Path, tiny_llama, wrong: str
) -> None:
    model = build(Llama, quantization_config(entropy), tiny_llama())
    codes = model.get_submodule("model.layers.0.self_attn.qkv_proj").codes
    shard, tensor, message = {
        "shape": ("q", torch.zeros(3, dtype=torch.uint8), r"q_proj\.codes: .* shape \(\d+,\), .* \(3,\)"),
        "kind": ("k", torch.zeros(3, dtype=torch.uint8), r"k_proj\.codes: .* no such tensor"),
        "shard": (None, torch.zeros(3, dtype=torch.uint8), "no part None"),
    }[wrong]
    with pytest.raises(ValueError, match=message):
        codes.weight_loader(codes, tensor, shard)


def test_after_loading_a_second_load_fails_instead_of_mixing_codes(plugin: ModuleType, entropy: Path) -> None:
    model, _ = served(Llama, entropy)
    with pytest.raises(KeyError, match="codes"):
        model.load_weights((n, t) for n, t in linear_tensors(entropy).items() if n.endswith("codes"))


@pytest.mark.parametrize("split", [QKVParallelLinear, RowParallelLinear])
def test_tensor_parallelism_is_refused(
    plugin: ModuleType, entropy: Path, monkeypatch: pytest.MonkeyPatch, split: type[LinearBase]
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "_tp_size", 2)
    leaf, sizes = ("o_proj", [64]) if split is RowParallelLinear else ("qkv_proj", [64, 32, 32])
    quant_config = plugin.LrsdQuantizationConfig.from_config(quantization_config(entropy))
    quant_config.packed_modules_mapping = Llama.packed_modules_mapping
    with pytest.raises(ValueError, match="tensor_parallel_size=1"):
        split(64, sizes, quant_config=quant_config, prefix=f"model.layers.0.self_attn.{leaf}")


def test_fused_tensors_in_an_order_of_their_own_are_refused(plugin: ModuleType) -> None:
    """BLOOM's and GPT-NeoX's loaders regroup query_key_value by head, which packed tensors cannot follow."""
    layers = {"h.query_key_value": {"terms": [{"form": "low_rank", "rank": 4}]}}
    packing = {"quant_method": "lrsd", "format_version": 2, "layers": layers}
    quant_config = plugin.LrsdQuantizationConfig.from_config(packing)
    with pytest.raises(ValueError, match="orders their outputs"):
        QKVParallelLinear(64, [64] * 3, quant_config=quant_config, prefix="h.query_key_value")


def test_what_vllm_has_no_place_for_is_refused_with_a_remedy(plugin: ModuleType, entropy: Path) -> None:
    stored = quantization_config(entropy)
    with pytest.raises(ValueError, match="--scope linear"):
        plugin.LrsdQuantizationConfig.from_config({**stored, "embeddings": ["model.embed_tokens"]})
    experts = {"mlp.experts": {"gated": True, "transposed": False}}
    with pytest.raises(ValueError, match=r"mlp\.experts holds experts .*`lrsd export`"):
        plugin.LrsdQuantizationConfig.from_config({**stored, "experts": experts})
    with pytest.raises(ValueError, match=r"q has a bias .*`--mean-correction`"):
        plugin.LrsdQuantizationConfig.from_config(
            {**stored, "layers": {"q": {"terms": [], "bias": True, "added_bias": True}}}
        )
    with pytest.raises(CheckpointError, match="format version 99"):
        plugin.LrsdQuantizationConfig.from_config({**stored, "format_version": 99})


def test_names_that_vllm_changes_are_followed(plugin: ModuleType, entropy: Path) -> None:
    quant_config = plugin.LrsdQuantizationConfig.from_config(quantization_config(entropy))
    quant_config.packed_modules_mapping = Llama.packed_modules_mapping

    class Mapper:
        def apply_dict(self, values: dict[str, Any]) -> dict[str, Any]:
            return {f"language_model.{name}": value for name, value in values.items()}

    quant_config.apply_vllm_mapper(Mapper())
    prefix = "language_model.model.layers.0.self_attn.qkv_proj"
    layer = QKVParallelLinear(64, [64, 32, 32], quant_config=quant_config, prefix=prefix)
    assert [layout is None for layout in layer.quant_method.formats.values()] == [False, True, False]


def test_registers_itself_by_name_and_as_often_as_vllm_likes(plugin: ModuleType, entropy: Path) -> None:
    plugin.register()
    config = _methods[quantization_config(entropy)["quant_method"]]
    assert config is plugin.LrsdQuantizationConfig
    assert config({}).get_name() == "lrsd"
    assert QUANTIZATION_METHODS == ["awq", "gptq", "lrsd"]


def test_layers_that_are_no_linears_are_left_to_vllm(plugin: ModuleType, entropy: Path) -> None:
    quant_config = plugin.LrsdQuantizationConfig.from_config(quantization_config(entropy))
    assert quant_config.get_quant_method(nn.Embedding(3, 4), "model.embed_tokens") is None
