"""Formats that other programs read, by the name that `lrsd export --format` knows them by.

A format is one file with one function: from a stored model to a new directory, one layer at a time.
"""

from collections.abc import Callable
from pathlib import Path

from lrsd.export.compressed_tensors import export_compressed_tensors
from lrsd.export.dense import export_dense

# Directory of the checkpoint, new directory, what is called with the name of each layer done; gives the bytes
# of tensors written.
Export = Callable[[Path, Path, Callable[[str], None]], int]

EXPORTS: dict[str, Export] = {
    "dense": export_dense,
    "compressed-tensors": export_compressed_tensors,
}
