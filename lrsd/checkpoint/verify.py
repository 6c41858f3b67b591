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
    REPORT_NAME,
    RUN_NAME,
    Manifest,
    read_manifest,
)
from lrsd.errors import CheckpointError
from lrsd.intake.json import require_inside

# The manifest itself, what differs from run to run, and what people edit or draw anew.
_NOT_VOUCHED_FOR = (MANIFEST_NAME, RUN_NAME, CARD_NAME, REPORT_NAME)


def digest_of(tensors: Iterable[Any]) -> str:
    """SHA-256 of the data of all tensors of a GGUF file, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(np.ascontiguousarray(tensor.data).view(np.uint8).data)
    return digest.hexdigest()


def digests(directory: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """SHA-256 by name of the files that a manifest vouches for; of the tensors of a GGUF file.

    names: of those to look at, if they are there; all by default. Raises: CheckpointError for one that leads
    out of the directory.
    """
    if directory.is_file():
        from gguf import GGUFReader

        return {GGUF_TENSORS: digest_of(GGUFReader(directory).tensors)}
    found = {}
    paths = directory.rglob("*") if names is None else (directory / name for name in names)
    for path in sorted(paths):
        if not require_inside(directory, path).is_file():
            continue
        name = path.relative_to(directory).as_posix()
        if names is not None or name not in _NOT_VOUCHED_FOR:
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
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
    found = digests(directory, None if directory.is_file() else manifest.files)
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
