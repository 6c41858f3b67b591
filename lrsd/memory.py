"""How much memory a compression takes: predicted before, measured after; and freed memory handed back."""

import ctypes
import resource
import sys
from functools import cache
from pathlib import Path

from torch import nn

from lrsd.model.layout import Layout
from lrsd.model.samples import Samples
from lrsd.sensitivity import PROBE_LOGITS

# Streams of hidden states held at once: entering block 0, entering this block, leaving it; with propagation
# a dense and a compressed pair.
_STREAMS = {False: 3, True: 4}
# Square float64 matrices of a group's width held at once while its layers are solved: G, its parts, a
# factor and an inverse; and weights in float64 or twice in float32.
_SQUARES, _WEIGHTS = 5, 4
# Float32 copies of a probe's logits: log-probabilities of the dense model, of the perturbed one, and a
# temporary.
_LOGITS = 3


def predicted_peak(
    model: nn.Module, layout: Layout, samples: Samples, batch: int, *, propagate: bool, loaded: int
) -> int:
    """Bytes in memory at the worst moment: those `loaded` with the model in memory, the cache of hidden
    states, and the largest working set, that of a block's replay and moments, of a layer's solver, or
    of a probe, which widens the head to float32.
    """
    parameters = list(model.parameters())
    value = parameters[0].element_size()
    cache = _STREAMS[propagate] * samples.positions * layout.stream_width * value
    largest = max(parameter.numel() for parameter in parameters)
    working = [4 * (largest + _LOGITS * PROBE_LOGITS * _vocabulary(model))]
    replayed = samples[:batch].positions
    for block in layout.blocks:
        widths = [group.in_features for group in block.groups]
        outputs = [spec.shape.out_features for group in block.groups for spec in group.linears]
        moments = 8 * sum(width**2 for width in widths)
        working.append(
            moments + replayed * (value * (sum(widths) + sum(outputs)) + 4 * max(widths, default=0))
        )
        for group in block.groups:
            layer = group.in_features * max(spec.shape.out_features for spec in group.linears)
            working.append(moments + 8 * (_SQUARES * group.in_features**2 + _WEIGHTS * layer))
    if propagate:
        # Inputs of a block's groups on all samples, and fitted weights beside the file that is mapped.
        cache += samples.positions * value * max(sum(g.in_features for g in b.groups) for b in layout.blocks)
        cache += sum(spec.shape.dense_bytes for spec in layout.linears.values())
    return max(peak_rss(), loaded + cache + max(working))


def _vocabulary(model: nn.Module) -> int:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head.weight.shape[0] if head is not None else 0


def peak_rss() -> int:
    """Most bytes that this process has held in memory at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def current_rss() -> int:
    """Bytes that this process holds in memory; where the system does not say, the most it has held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_rss()


def release_freed() -> None:
    """Give freed memory back to the system, where the C library keeps it (glibc): a block's worth of
    matrices otherwise stays with the process, several times over."""
    if trim := _malloc_trim():
        trim(0)


@cache
def _malloc_trim() -> "ctypes._FuncPointer | None":
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
