"""JSON of untrusted files: bounded in size, depth and digits."""

import json
from pathlib import Path
from typing import Any

from lrsd.errors import CheckpointError, InputError
from lrsd.intake.lfs import refuse_pointer

CONFIG_NAME = "config.json"


# Bounds far above real files: an index of 10^5 tensors takes 10 MB, a tokenizer of 256,000 tokens 35 MB, the
# header of a shard with 10^5 tensors 12 MB.
_LARGEST_JSON, _LARGEST_HEADER = 2**26, 2**25


# Digits of a number of 64 bits, and of what tokenizers call no limit, 10^30.
_DIGITS, NO_LIMIT_DIGITS = 20, 31


def require_inside(directory: Path, path: Path) -> Path:
    """The path itself. Raises: CheckpointError if it is a link to somewhere else; the hub's cache, whose
    snapshots are links to its blobs, is one place.
    """
    root = directory.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parents[1] / "blobs")
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path} is a link that leads out of {directory}; put the file itself there")
    return path


def read_json(path: Path, digits: int = _DIGITS) -> dict[str, Any]:
    """digits: of the longest number. Raises: InputError if the file is not a JSON object, or larger than any
    legitimate one."""
    if not path.is_file():
        raise InputError(f"{path} is missing, or no regular file")
    if path.stat().st_size > _LARGEST_JSON:
        raise InputError(f"{path} has {path.stat().st_size:,} bytes, at most {_LARGEST_JSON:,} are read")
    try:
        refuse_pointer(path)
        content = parse_json(path.read_text(encoding="utf-8"), digits)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def parse_json(text: str | bytes, digits: int = _DIGITS) -> Any:
    """`json.loads`, with ValueError for all that is wrong: nesting without end, numbers beyond 64 bits."""

    def integer(written: str) -> int:
        if len(written) > digits:
            raise ValueError(f"a number of {len(written)} digits")
        return int(written)

    try:
        return json.loads(text, parse_int=integer)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
