"""The manifest: what was done, to what, and what came of it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lrsd.errors import CheckpointError
from lrsd.forms.layer import parse_layer
from lrsd.intake.gguf import read_gguf_text
from lrsd.intake.json import read_json
from lrsd.work.files import write_json
from lrsd.work.records import decode

MANIFEST_NAME = "lrsd.json"
MANIFEST_VERSION = 2
RECIPE_NAME = "recipe.json"
CARD_NAME = "README.md"
# The card of the model that was compressed, beside the result's own.
BASE_CARD_NAME = "README.base.md"
RUN_NAME = "run.json"
# The page with pictures, which is drawn of all that once it is finished.
REPORT_NAME = "report.html"
# In the metadata of a GGUF file.
GGUF_PREFIX, GGUF_MANIFEST = "lrsd.", "manifest"
# What a manifest there calls the data of all tensors.
GGUF_TENSORS = "tensors"


@dataclass(frozen=True)
class LayerRecord:
    """One linear weight in the manifest. error: measured relative output error against its target.

    layer: its entry in config.json; None: the weight stayed dense. parameters: what its method made the offer
    of. interpolation: how far its target moved from its own weight towards the one that makes up for the
    errors of its inputs. state, reason, damping: of the solver. routed_tokens: of the calibration text, that
    reached this expert; None: all of them.
    """

    out_features: int
    in_features: int
    layer: dict[str, Any] | None
    parameters: dict[str, float]
    bytes: int
    dense_bytes: int
    error: float
    predicted_error: float
    sensitivity: float
    interpolation: float
    state: str
    reason: str = ""
    damping: float = 0.0
    history: tuple[float, ...] = ()
    routed_tokens: int | None = None

    @property
    def stored_as(self) -> str:
        """The parts that it is stored as, in words."""
        return "dense" if self.layer is None else parse_layer("", self.layer).describe()


@dataclass(frozen=True)
class Manifest:
    """lrsd.json: what was done, to what, and what came of it. text: digest or name of the calibration text.
    files: SHA-256 of every file beside it, but the model card, which people edit, and the report,
    which is drawn of it. recovery: settings, text
    and losses of a distillation after it, see `training.recover`; empty: there was none. seconds by phase and
    memory in bytes differ from run to run: they are kept apart, in run.json."""

    base_model: str
    base_fingerprint: str
    base_stored_as: str
    lrsd_version: str
    environment: dict[str, str]
    text: str
    recipe: dict[str, Any]
    ratio: float
    checkpoint_ratio: float
    linear_bytes: int
    dense_linear_bytes: int
    budget_bytes: int
    bits_per_weight: float
    macs_per_token: int
    dense_macs_per_token: int
    allocation: dict[str, float]
    allocation_chosen: str
    expected_kl: float | None
    propagated: bool
    layers: dict[str, LayerRecord]
    files: dict[str, str] = field(default_factory=dict)
    model_class: str = "AutoModelForCausalLM"
    untouched: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    recovery: dict[str, Any] = field(default_factory=dict)
    version: int = field(default=MANIFEST_VERSION)


def holds_manifest(path: Path) -> bool:
    """Whether a directory or GGUF file is a result of this program's."""
    if path.is_file():
        return _of_gguf(path) is not None
    return (path / MANIFEST_NAME).is_file()


def read_manifest(directory: Path) -> Manifest:
    """Of a directory, or of a GGUF file, which has it in its metadata.

    Raises: CheckpointError if it is no result of this program's that this release can read.
    """
    path = directory if directory.is_file() else directory / MANIFEST_NAME
    if not holds_manifest(directory):
        what = "metadata of lrsd's" if directory.is_file() else MANIFEST_NAME
        raise CheckpointError(
            f"{directory} holds no {what}; expected a directory or a GGUF file written by lrsd compress"
        )
    content = json.loads(_of_gguf(path) or "") if directory.is_file() else read_json(path)
    if content.get("version") != MANIFEST_VERSION:
        raise CheckpointError(
            f"{path} has version {content.get('version')}, this lrsd reads {MANIFEST_VERSION}"
        )
    if (directory / RUN_NAME).is_file():
        content |= read_json(directory / RUN_NAME)
    try:
        return decode(Manifest, content)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a complete lrsd manifest: {error}") from error


def _of_gguf(path: Path) -> str | None:
    if path.suffix != ".gguf":
        return None
    return read_gguf_text(path, f"{GGUF_PREFIX}{GGUF_MANIFEST}")


def manifest_text(manifest: Manifest) -> str:
    """As a GGUF file has it: without what differs from run to run."""
    content = asdict(manifest)
    for name in ("seconds", "memory"):
        del content[name]
    return json.dumps(content, separators=(",", ":"))


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """lrsd.json and run.json. Raises: StorageError."""
    content = asdict(manifest)
    write_json(directory / RUN_NAME, {name: content.pop(name) for name in ("seconds", "memory")})
    write_json(directory / MANIFEST_NAME, content)
