"""Files written atomically: there whole or not at all, and on disk."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lrsd.errors import TRY_AGAIN, StorageError

PARTIAL = ".partial"
# What the system says of a disk, or a share of one, that is full.
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Write to the path given; when the context ends the file is on disk under `path`, else nothing is.

    Raises: StorageError if the disk is full or refuses.
    """
    temporary = path.with_name(path.name + PARTIAL)
    with refusals(path):
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file. Raises: StorageError."""
    with written(path) as temporary:
        temporary.touch()
        mode = (
            temporary.stat().st_mode
        )  # as the user's umask has it; safetensors would take others' right to read
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, temporary, metadata=metadata)
        temporary.chmod(mode)


def write_json(path: Path, content: Any) -> None:
    """Raises: StorageError."""
    with written(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """What the system and safetensors say of a disk that does not take what is written to `path`.

    Raises: StorageError for any of it.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        failure = StorageError(f"cannot write {path}: {reason}; free some space or choose another disk")
        if isinstance(error, OSError) and error.errno in _FULL:
            failure.exit_code = TRY_AGAIN
        raise failure from error


def sync(path: Path) -> None:
    """Have a file's content, or a directory's entries, on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
