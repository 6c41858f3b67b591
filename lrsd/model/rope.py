"""The scaling of rotary positions that a GGUF file holds, of which transformers reads nothing.

Fields and tensors mean what llama.cpp makes of them (https://github.com/ggml-org/llama.cpp): the frequency of
every rotated pair is divided by the pair's factor.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from lrsd.errors import InputError
from lrsd.intake.gguf import GgufFile, read_gguf

# Factors for every length; else those up to the length that a model was first trained on, and beyond it.
_ALWAYS, _SHORT, _LONG = (f"rope_{name}.weight" for name in ("freqs", "factors_short", "factors_long"))
_KINDS = ("none", "linear", "yarn", "longrope")
# The formula of the factors of Llama 3.1 to 3.3, whose files hold its results alone, to float32.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_ROUNDING = 1e-3
# Factors beyond this, 1e30 in files, leave a pair where it is.
_STILL = 1e9
# More of YaRN's numbers, which no architecture that transformers reads has; 0 and 1 say nothing.
_UNREAD = tuple(f"scaling.yarn_{name}" for name in ("log_multiplier", "ext_factor", "attn_factor"))
_INSTEAD = "give the model's safetensors, from which the file was converted"


@dataclass(frozen=True)
class _Scaling:
    """kind: one of _KINDS; factor: by which positions are divided; attention: by which cosines and sines are
    multiplied; length: that the model was first trained on; betas: YaRN's, named as by transformers."""

    kind: str
    factor: float
    attention: float
    length: int
    betas: dict[str, float]


def carry_rope(config: PretrainedConfig, path: Path) -> None:
    """Put the scaling of rotary positions that a GGUF file holds into the configuration that was made of it.

    Factors become rope_type "llama3" where they are that formula's, else "longrope", whose frequencies are
    theta^(-2i/d) / factor_i; numbers alone become "linear" or "yarn". Where layers differ in what they see,
    it is that of those that see the whole text, like in llama.cpp.

    Raises: InputError for a scaling that transformers has no words for.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)
    if not parameters:
        return
    file = read_gguf(path)
    scaling = _read_scaling(file, config.max_position_embeddings)
    short, long = _read_factors(file)
    if long:
        found = _by_factors(path, parameters, scaling, short, long)
        found |= _rotated_share(path, config, parameters, len(long)) if found else {}
    else:
        found = _by_numbers(path, scaling)
    if not found:
        return
    parameters.update(found)
    if hasattr(config, "original_max_position_embeddings"):  # Phi-3's, which transformers prefers
        config.original_max_position_embeddings = scaling.length
    config.standardize_rope_params()
    config.validate_rope()


def _read_scaling(file: GgufFile, context: int) -> _Scaling:
    """The fields "<architecture>.rope.scaling.*", with llama.cpp's defaults. Raises: InputError."""
    prefix = f"{file.fields['general.architecture']}.rope."

    def number(key: str, default: float) -> float:
        value = file.fields.get(prefix + key, default)
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise InputError(f"{file.path}: {prefix}{key} is {value!r:.40}, expected a number")
        return value or default

    kind = file.fields.get(f"{prefix}scaling.type", "linear")
    if kind not in _KINDS:
        raise InputError(f"{file.path} scales its positions by {kind!r:.40}, which is unknown; {_INSTEAD}")
    for key in _UNREAD:
        if kind == "yarn" and number(key, 1.0) != 1:
            raise InputError(f"{file.path} has {prefix}{key}, which is not read; {_INSTEAD}")
    betas = {f"beta_{end}": number(f"scaling.yarn_beta_{end}", 0) for end in ("fast", "slow")}
    return _Scaling(
        str(kind),
        1.0 if kind == "none" else number("scaling.factor", number("scale_linear", 1.0)),
        number("scaling.attn_factor", 1.0),
        int(number("scaling.original_context_length", context)),
        {name: beta for name, beta in betas.items() if beta},
    )


def _read_factors(file: GgufFile) -> tuple[list[float], list[float]]:
    """The factors of short and of long texts, both empty if there are none. Raises: InputError."""
    if always := file.vector(_ALWAYS):
        found = always, always
    else:
        found = file.vector(_SHORT) or [], file.vector(_LONG) or []
    if len(found[0]) != len(found[1]):
        raise InputError(
            f"{file.path} holds {len(found[0])} values in {_SHORT}, {len(found[1])} in {_LONG}; {_INSTEAD}"
        )
    for factor in (*found[0], *found[1]):
        if not 0 < factor < math.inf:
            raise InputError(f"{file.path}: {factor} among its rotary factors; {_INSTEAD}")
    return found


def _check_still(path: Path, factors: Sequence[float], parameters: dict[str, Any]) -> None:
    """Raises: InputError unless factors rotate the pairs that the parameters rotate already, and no other."""
    rotated = int(parameters.get("partial_rotary_factor", 1.0) * len(factors))
    if any(factor != 1 for factor in factors[:rotated]) or any(f < _STILL for f in factors[rotated:]):
        raise InputError(f"{path} holds rotary factors other than to rotate {rotated} pairs; {_INSTEAD}")


def _by_factors(
    path: Path, parameters: dict[str, Any], scaling: _Scaling, short: list[float], long: list[float]
) -> dict[str, Any]:
    """transformers' parameters for a file with factors. Raises: InputError if it also has another scaling."""
    if scaling.factor != 1:
        raise InputError(f"{path} scales its positions by factors and by {scaling.kind} too; {_INSTEAD}")
    if parameters.get("rope_type") == "proportional":
        _check_still(path, long, parameters)
        return {}
    if short == long and scaling.attention == 1:
        if set(long) == {1.0}:
            return {}
        formula = _llama3_factors(parameters["rope_theta"], len(long), max(long))
        if torch.allclose(torch.tensor(long, dtype=torch.float64), formula, rtol=_ROUNDING, atol=0):
            return {"rope_type": "llama3", "factor": max(long), **_LLAMA3}
    return {
        "rope_type": "longrope", "short_factor": short, "long_factor": long,
        "attention_factor": scaling.attention, "original_max_position_embeddings": scaling.length,
    }  # fmt: skip


def _llama3_factors(theta: float, count: int, factor: float) -> torch.Tensor:
    """(count,) float64: 1 for pairs that turn more than 4 times in 8192 tokens, `factor` below once."""
    low, high, length = _LLAMA3.values()
    frequencies = theta ** (-torch.arange(count, dtype=torch.float64) / count)
    turns = length * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / (kept + (1 - kept) / factor)


def _rotated_share(
    path: Path, config: PretrainedConfig, parameters: dict[str, Any], pairs: int
) -> dict[str, float]:
    """The part of a head that is rotated, for models that rotate a part; GGUF's own field for it is not read
    either. Raises: InputError for more or fewer factors than the model has pairs."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if "partial_rotary_factor" in parameters and 2 * pairs <= head:
        return {"partial_rotary_factor": 2 * pairs / head}
    if 2 * pairs != head:
        raise InputError(f"{path} holds {pairs} rotary factors for {head // 2} pairs; {_INSTEAD}")
    return {}


def _by_numbers(path: Path, scaling: _Scaling) -> dict[str, Any]:
    """transformers' parameters for a file without factors. Raises: InputError."""
    if scaling.kind == "longrope":
        raise InputError(f"{path} scales its positions by longrope, but holds no factors; {_INSTEAD}")
    if scaling.kind == "yarn" and scaling.factor != 1:
        # llama.cpp multiplies this by the paper's own, which is transformers' default.
        attention = scaling.attention * (1 + 0.1 * math.log(max(scaling.factor, 1)))
        return {
            "rope_type": "yarn", "factor": scaling.factor, "attention_factor": attention,
            "original_max_position_embeddings": scaling.length, **scaling.betas,
        }  # fmt: skip
    if scaling.attention != 1:
        raise InputError(
            f"{path} scales attention by {scaling.attention:.4g}, which is read of YaRN; {_INSTEAD}"
        )
    return {} if scaling.factor == 1 else {"rope_type": "linear", "factor": scaling.factor}
