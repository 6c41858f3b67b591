"""A recipe: all settings of a compression, flat under the names of the command line's options."""

import difflib
from dataclasses import dataclass, field, fields
from typing import Any

from lrsd.errors import SettingsError
from lrsd.methods import METHODS
from lrsd.methods.base import Method
from lrsd.methods.lrsd import Lrsd
from lrsd.settings import Budget, Calibration, Run, Selection

# The method whose results a format can hold.
METHOD_OF_FORMAT = {"compressed-tensors": "integers", "gguf": "gguf"}
GROUPS: dict[str, type] = {"budget": Budget, "selection": Selection, "calibration": Calibration, "run": Run}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is fitted, on what, within which bytes."""

    budget: Budget
    method: Method = field(default_factory=Lrsd)
    selection: Selection = field(default_factory=Selection)
    calibration: Calibration = field(default_factory=Calibration)
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        """Raises: SettingsError for a format that cannot hold what would be made."""
        self.method.allocation(self.budget.allocation)
        name, needed = self.run.format, METHOD_OF_FORMAT.get(self.run.format)
        if needed not in (None, self.method_name):
            raise SettingsError(
                f"format {name} holds what --method {needed} makes, not {self.method_name}; leave out one of "
                "the two"
            )
        if self.method_name == "gguf" and name != "gguf":
            raise SettingsError(
                f"method gguf makes what format gguf holds, not {name}; leave out one of the two"
            )
        if name == "compressed-tensors" and self.budget.scope == "checkpoint":
            raise SettingsError(
                f"format {name} keeps embeddings and head at 16 bit, which --scope checkpoint would have in "
                "8; leave out one of the two"
            )

    @staticmethod
    def of(*, method: str | None = None, **options: Any) -> "Recipe":
        """From options by name; texts are parsed as the command line does. method: by default the one that
        the format needs, or lrsd.

        Raises: SettingsError for a name that the method does not have, or an impossible value.
        """
        needed = METHOD_OF_FORMAT.get(options.get("format", "lrsd"))
        method = method or needed or "lrsd"
        if method not in METHODS:
            raise SettingsError(f"method must be one of {', '.join(METHODS)}, got {method!r:.40}")
        if method == "gguf":
            options.setdefault("format", "gguf")
        if options.get("ratio", 0) is None:  # of a recipe that has a size
            del options["ratio"]
        if options.get("size") is not None or options.get("format") == "gguf":
            options.setdefault("scope", "checkpoint")
        kinds = {**GROUPS, "method": METHODS[method]}
        owners = {f.name: name for name, kind in kinds.items() for f in fields(kind)}
        given: dict[str, dict[str, Any]] = {name: {} for name in kinds}
        for option, value in options.items():
            if option not in owners:
                raise SettingsError(_unknown(option, method, list(owners)))
            given[owners[option]][option] = _parsed(kinds[owners[option]], option, value)
        return Recipe(**{name: kind(**given[name]) for name, kind in kinds.items()})

    @property
    def method_name(self) -> str:
        return next(name for name, kind in METHODS.items() if type(self.method) is kind)

    def to_dict(self) -> dict[str, Any]:
        """Every option by its name, as `--recipe` reads them back."""
        options: dict[str, Any] = {"method": self.method_name}
        for part in (self.budget, self.method, self.selection, self.calibration, self.run):
            options |= {f.name: getattr(part, f.name) for f in fields(part)}
        options["ratio"] = None if self.budget.size else f"{float(self.budget.ratio)!r}x"
        return {name: list(v) if isinstance(v, tuple) else v for name, v in options.items()}


def _parsed(kind: type, option: str, value: Any) -> Any:
    found = next(f for f in fields(kind) if f.name == option)
    parse = found.metadata["parse"]
    if parse is not None and isinstance(value, str):
        return parse(value)
    return tuple(value) if isinstance(value, list) else value


def _unknown(option: str, method: str, known: list[str]) -> str:
    """Why an option is none, and which one may have been meant."""
    having = [name for name, kind in METHODS.items() if option in {f.name for f in fields(kind)}]
    dashed = option.replace("_", "-")
    if having:
        return f"method {method} has no {dashed}; leave it out, or use --method {' or '.join(having)}"
    close = difflib.get_close_matches(option, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown setting {option!r:.60}; {hint}available: {', '.join(sorted(known))}"
