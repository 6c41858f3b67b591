"""Passes with a cache of keys and values: the only place that knows what transformers calls it."""

from inspect import signature

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from lrsd.work.onloading import compute_device


def cached_pass(model: PreTrainedModel, tokens: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
    """Logits of `tokens` (batch, T) after those that `cache` remembers, and the cache with them in it.

    transformers 5.24 renamed `past_key_values` to `cache`, in arguments and outputs; 5.20 knows the old
    name only.
    """
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    output = model(tokens.to(compute_device(model)), **{name: cache}, use_cache=True)
    return output.logits, getattr(output, name)
