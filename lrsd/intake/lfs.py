"""What git leaves in place of a large file that was not fetched."""

from pathlib import Path

from lrsd.errors import InputError

_BEGINNING = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path) -> None:
    """Raises: InputError if the file is a git-lfs pointer; OSError if it cannot be read."""
    with path.open("rb") as file:
        if file.read(len(_BEGINNING)) == _BEGINNING:
            raise InputError(
                f"{path} is a git-lfs pointer, three lines that stand for the file; run `git lfs pull` "
                "there, or download the file itself"
            )
