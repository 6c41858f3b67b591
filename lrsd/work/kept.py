"""What calibration found of a model, kept for other runs of the same model and text: a sweep over ratios.

    DIR/KEY/calibration.json      what it is of
    DIR/KEY/NAME.safetensors      records of the journal

KEY is made from all that the records depend on. A directory appears whole or not at all, and is not changed.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from lrsd.work.files import refusals, sync, write_json
from lrsd.work.records import read_record

T = TypeVar("T")

_ABOUT = "calibration.json"


class Kept:
    """Records of one model, text and settings in a directory that runs share."""

    def __init__(self, directory: Path, about: dict[str, Any]) -> None:
        """about: all that the records depend on."""
        self._about = about
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        self.directory = directory / key

    @property
    def complete(self) -> bool:
        return (self.directory / _ABOUT).is_file()

    def read(self, name: str, kind: type[T]) -> T:
        """Raises: CheckpointError if the file is damaged or gone."""
        return read_record(self.directory / f"{name}.safetensors", kind)

    def keep(self, source: Path, names: Iterable[str]) -> None:
        """Records of these names, as they are in the directory `source`; nothing where another run was
        faster. Raises: StorageError."""
        with refusals(self.directory):
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.directory.parent, ignore_cleanup_errors=True) as place:
                made = Path(place) / self.directory.name
                made.mkdir()
                for name in names:
                    file = f"{name}.safetensors"
                    try:
                        os.link(source / file, made / file)
                    except OSError:  # on another disk, or one without links
                        shutil.copy2(source / file, made / file)
                        sync(made / file)
                write_json(made / _ABOUT, self._about)
                try:
                    made.replace(self.directory)
                except OSError:
                    if not self.complete:  # else another run was faster
                        raise
                sync(self.directory.parent)
