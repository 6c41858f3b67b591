"""What torch calls when it is imported, wherever lrsd is installed, so that transformers loads compressed
checkpoints in programs that do not `import lrsd`: notebooks, other tools' command lines.

It only notes where transformers keeps its quantization methods; lrsd itself is imported with the first
compressed checkpoint. TORCH_DEVICE_BACKEND_AUTOLOAD=0 switches it off, together with all extensions of torch.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_METHODS = "transformers.quantizers.auto"


def register() -> None:
    """Add lrsd to transformers' table of quantization methods, now or as soon as it is there."""
    if not _announce(sys.modules.get(_METHODS)):
        sys.meta_path.insert(0, _Watch())


def _announce(table: ModuleType | None) -> bool:
    """Whether the table was there, and all of it."""
    methods = getattr(table, "AUTO_QUANTIZATION_CONFIG_MAPPING", None)
    if methods is None:
        return False
    methods.setdefault("lrsd", OnDemand)
    return True


class OnDemand:
    """In the place of the checkpoint's quantization config until one is loaded."""

    @classmethod
    def from_dict(cls, entry: dict[str, Any], **more: Any) -> Any:
        """What lrsd's own class makes of the entry in config.json."""
        from lrsd.runtimes.transformers import LrsdConfig

        return LrsdConfig.from_dict(entry, **more)


class _Watch(MetaPathFinder):
    """Announces lrsd when transformers' table is imported, and goes.

    Where the table itself imported torch, that is when the next module is imported.
    """

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if _announce(sys.modules.get(_METHODS)):
            self._go()
            return None
        if name != _METHODS:
            return None
        self._go()
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Announcing(spec.loader)
        return spec

    def _go(self) -> None:
        # Another list: Python is going through this one.
        sys.meta_path = [finder for finder in sys.meta_path if finder is not self]


class _Announcing(Loader):
    """Loads a module as its own loader does, and announces lrsd in it."""

    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        _announce(module)
