"""Mixtures of experts: fused 3-D weights taken apart into one linear layer per expert, and put together.

transformers keeps all experts of a block in two parameters, `gate_up_proj` (or `up_proj`) and `down_proj`, of
shape (experts, out, in), or (experts, in, out). Taken apart, `experts.ups.3` and `experts.downs.3` are linear
layers like any other: traced, measured, fitted and packed on their own. Llama 4's module does not say which
way round its parameters are, and is called with all tokens for every expert, times zero where not its own.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

UPS, DOWNS = "ups", "downs"


def is_fused(module: nn.Module) -> bool:
    """Whether this is a module of fused experts of a known kind."""
    down = module._parameters.get("down_proj")
    known = hasattr(module, "is_transposed") or type(module) is Llama4TextExperts
    return down is not None and down.dim() == 3 and known


def is_unfused(module: nn.Module) -> bool:
    return isinstance(getattr(module, UPS, None), nn.ModuleList) and hasattr(module, "is_transposed")


def unfuse_experts(model: nn.Module) -> None:
    """Take every module of fused experts apart, in place."""
    for module in [module for module in model.modules() if is_fused(module)]:
        _unfuse(module)


def fusions(model: nn.Module) -> dict[str, dict[str, bool]]:
    """Modules of experts that are taken apart, and what it takes to fuse their weights again."""
    return {
        name: {"gated": bool(module.has_gate), "transposed": bool(module.is_transposed)}
        for name, module in model.named_modules()
        if is_unfused(module)
    }


def fuse_experts(model: nn.Module) -> None:
    """Undo `unfuse_experts`, all experts being dense again."""
    unfused: list[Any] = [module for module in model.modules() if is_unfused(module)]
    for module in unfused:
        for parameter, parts in fused_names(gated=module.has_gate).items():
            linears = list(getattr(module, parts))
            weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
            setattr(module, parameter, _parameter(fused_weight(weights, transposed=module.is_transposed)))
            if module.has_bias:
                setattr(module, f"{parameter}_bias", _parameter(torch.stack(biases)))
            delattr(module, parts)
        del module.forward


def fused_weight(weights: list[Tensor], *, transposed: bool) -> Tensor:
    """(experts, out, in) of linear weights, or (experts, in, out) where the model has it so."""
    stacked = torch.stack(weights)
    return stacked.transpose(1, 2).contiguous() if transposed else stacked


def fused_names(*, gated: bool) -> dict[str, str]:
    """The name of each fused parameter, and of the list that its experts are in."""
    return {"gate_up_proj" if gated else "up_proj": UPS, "down_proj": DOWNS}


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _unfuse(module: Any) -> None:
    weighed = type(module) is Llama4TextExperts
    if weighed:
        module.has_gate, module.has_bias, module.is_transposed = True, False, True
    for parameter, parts in fused_names(gated=module.has_gate).items():
        weight_EOI = getattr(module, parameter)
        if module.is_transposed:
            weight_EOI = weight_EOI.transpose(1, 2)
        bias_EO = getattr(module, f"{parameter}_bias") if module.has_bias else None
        linears = []
        for expert in range(len(weight_EOI)):
            out_features, in_features = weight_EOI.shape[1:]
            linear = nn.Linear(in_features, out_features, bias=module.has_bias, device="meta")
            linear.weight = _parameter(weight_EOI[expert].clone())
            if bias_EO is not None:
                linear.bias = _parameter(bias_EO[expert].clone())
            linears.append(linear)
        delattr(module, parameter)
        if bias_EO is not None:
            delattr(module, f"{parameter}_bias")
        setattr(module, parts, nn.ModuleList(linears))
    module.forward = MethodType(_forward_weighed if weighed else _forward, module)
    module._is_hf_initialized = True  # transformers would look for the fused parameters to initialise them


def _forward(self: Any, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
    """transformers' own loop over the experts that are hit, each a module of its own.

    routing: indices (tokens, top_k) of the experts and their weights (tokens, top_k), in this order.
    """
    indices_TK, weights_TK = (*routing, *named.values())[:2]
    result = torch.zeros_like(hidden_states)
    for expert in indices_TK.unique().tolist():
        if not 0 <= expert < len(self.ups):
            continue
        token, choice = torch.where(indices_TK == expert)
        up = self.ups[expert](hidden_states[token])
        down = self.downs[expert](self._apply_gate(up) if self.has_gate else self.act_fn(up))
        if getattr(self, "has_post_expert_norm", False):  # since transformers 5.20
            down = self.post_expert_norm(down)
        result.index_add_(0, token, (down * weights_TK[token, choice, None]).to(result.dtype))
    return result


def _forward_weighed(self: Any, hidden_states: Tensor) -> Tensor:
    """Llama 4's: hidden_states (experts x tokens, width), zero where a token is not the expert's."""
    inputs_ETI = hidden_states.view(len(self.ups), -1, hidden_states.shape[-1])
    result = torch.zeros_like(inputs_ETI)
    for expert, x in enumerate(inputs_ETI):
        (tokens,) = x.any(-1).nonzero(as_tuple=True)
        if len(tokens):
            gate, up = self.ups[expert](x[tokens]).chunk(2, dim=-1)
            result[expert, tokens] = self.downs[expert](up * self.act_fn(gate))
    return result.view_as(hidden_states)
