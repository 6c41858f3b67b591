"""Files are there whole, and for whoever may read what this user writes."""

import os
from pathlib import Path

import pytest
import torch

from lrsd.work.files import write_json, write_tensors


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], ids=oct)
def test_weights_are_readable_by_whom_the_umask_lets(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "model.safetensors", {"weight": torch.zeros(2)})
        write_json(tmp_path / "config.json", {})
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~umask}
