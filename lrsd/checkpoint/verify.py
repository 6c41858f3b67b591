"""Every file of a checkpoint against its SHA-256 in the manifest."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lrsd.checkpoint.manifest import (
    CARD_NAME,
    GGUF_TENSORS,
    MANIFEST_NAME,
    RUN_NAME,
    Manifest,
    read_manifest,
)
from lrsd.errors import CheckpointError


def digest_of(tensors: Iterable[Any]) -> str:
    """SHA-256 of the data of all tensors of a GGUF file, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(np.ascontiguousarray(tensor.data).view(np.uint8).data)
    return digest.hexdigest()


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 by name of the files that a manifest vouches for; of the tensors of a GGUF file."""
    if directory.is_file():
        from gguf import GGUFReader

        return {GGUF_TENSORS: digest_of(GGUFReader(directory).tensors)}
    found = {}
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.name not in (MANIFEST_NAME, RUN_NAME, CARD_NAME):
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def verify(directory: Path) -> Manifest:
    """Compare every file with the manifest's digest.

    Raises: CheckpointError naming the files that are missing or differ, or if the manifest holds no digests.
    """
    manifest = read_manifest(directory)
    if not manifest.files:
        raise CheckpointError(
            f"{directory / MANIFEST_NAME} holds no digests; nothing can be compared with it"
        )
    found = digests(directory)
    missing = sorted(set(manifest.files) - set(found))
    changed = sorted(n for n, digest in manifest.files.items() if n in found and found[n] != digest)
    problems = [
        f"{', '.join(names)} {what}" for names, what in ((missing, "missing"), (changed, "changed")) if names
    ]
    if problems:
        raise CheckpointError(
            f"{directory} is not as lrsd wrote it: {'; '.join(problems)}; copy or compress it again"
        )
    return manifest
