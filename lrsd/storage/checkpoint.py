"""A compressed model as a directory: written aside, synced, renamed; read back, checked, exported."""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrsd.errors import CheckpointError, InputError
from lrsd.memory import MappedFiles
from lrsd.model.experts import fused_names, fused_weight
from lrsd.model.hf import LrsdConfig
from lrsd.model.linear import LayerFormat, LowRankSparseLinear
from lrsd.numerics.allocate import Shape
from lrsd.storage.files import PARTIAL, refusals, sync, write_json, write_tensors
from lrsd.storage.inventory import INDEX_NAME, read_json, require_inside, shard_paths, take_inventory
from lrsd.storage.records import decode

MANIFEST_NAME = "lrsd.json"
MANIFEST_VERSION = 1
RECIPE_NAME = "recipe.json"
CARD_NAME = "README.md"
RUN_NAME = "run.json"


@dataclass(frozen=True)
class LayerRecord:
    """One linear weight in the manifest. error: measured relative output error against its target.

    rank None: the weight stayed dense. coding: "entropy" or "fixed" codes, with the width and group of
    the latter and the step of the former. blend: how far its target moved from its own weight towards
    the one that makes up for the compressed prefix. status: of the solver. routed_tokens: of the
    calibration text, that reached this expert; None: all of them.
    """

    out_features: int
    in_features: int
    rank: int | None
    coding: str | None
    code_bits: int | None
    group: int
    step: float
    columns: int
    rows: int
    entries: int | None
    bias: bool
    bytes: int
    dense_bytes: int
    error: float
    predicted_error: float
    sensitivity: float
    blend: float
    status: str
    history: tuple[float, ...] = ()
    routed_tokens: int | None = None


@dataclass(frozen=True)
class Manifest:
    """lrsd.json: what was done, to what, and what came of it. files: SHA-256 of every file beside it, but the
    model card, which people edit. seconds by phase and memory in bytes differ from run to run: they are kept
    apart, in run.json."""

    base_model: str
    base_fingerprint: str
    base_stored_as: str
    lrsd_version: str
    environment: dict[str, str]
    calibration: dict[str, Any]
    settings: dict[str, Any]
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
    version: int = field(default=MANIFEST_VERSION)


def read_manifest(directory: Path) -> Manifest:
    """Raises: CheckpointError if the directory is no compressed checkpoint this release can read."""
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{directory} holds no {MANIFEST_NAME}; expected a directory written by lrsd compress"
        )
    content = read_json(path)
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


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """lrsd.json and run.json. Raises: StorageError."""
    content = asdict(manifest)
    write_json(directory / RUN_NAME, {name: content.pop(name) for name in ("seconds", "memory")})
    write_json(directory / MANIFEST_NAME, content)


def write_model(model: PreTrainedModel, directory: Path, shard_size: str) -> None:
    """What `save_pretrained` writes, to the byte, with no more than one shard in memory of what is mapped
    from files. Raises: StorageError.
    """
    with refusals(directory):
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
        if model.can_generate():
            model.generation_config.save_pretrained(directory)
    ignored = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    split = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_size
    )
    mapped = MappedFiles()
    for name, keys in split.filename_to_tensors.items():
        tensors = {key: state[key].contiguous() for key in keys}
        write_tensors(directory / name, tensors, {"format": "pt"})
        mapped.release(mapped.pages(tensors.values()))
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        write_json(directory / INDEX_NAME, index)


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 by name of the files that a manifest vouches for."""
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


def require_place(directory: Path) -> None:
    """Raises: InputError for an output directory that no finished one can be renamed to."""
    if directory.is_symlink():
        reason = "is a link"
    elif directory.absolute().name in ("", ".."):
        reason = "has no name of its own"
    elif directory.absolute().is_mount():
        reason = "is a mount point"
    elif directory.is_dir() and directory.samefile("."):
        reason = "is the current directory"
    else:
        return
    raise InputError(
        f"output directory {directory} {reason}; name one that is not there yet, like {directory / 'out'}"
    )


def require_free(directory: Path) -> None:
    """Raises: InputError if the output directory exists and is not empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} already exists and is not empty; choose another output directory")


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory that appears under its name only when complete: written aside, synced, renamed."""
    require_place(target)
    require_free(target)
    target = target.absolute()
    with refusals(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=PARTIAL, dir=target.parent))
    try:
        yield aside
        publish(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def publish(written: Path, target: Path) -> None:
    """Sync a directory and let it appear under another name. Raises: StorageError."""
    with refusals(target):
        for path in (*written.rglob("*"), written):
            sync(path)
        written.chmod(0o755)
        if target.exists():
            target.rmdir()
        written.rename(target)
        sync(target.absolute().parent)


def stored_bytes(directory: Path, layers: dict[str, Any] | None = None) -> int:
    """Bytes of the tensors in the shards: all of them, or those of the named layers only."""
    total = 0
    for shard in shard_paths(directory):
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                if layers is None or key.rpartition(".")[0] in layers:
                    total += file.get_tensor(key).nbytes
    return total


def export_dense(
    directory: Path,
    target: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> int:
    """Write L + S as plain dense weights that any runtime loads, one shard and layer at a time.

    Returns: bytes of tensors written. Raises: CheckpointError if `directory` is not compressed.
    """
    config = read_json(directory / "config.json")
    packing = config.pop("quantization_config", None)
    if not isinstance(packing, dict) or packing.get("quant_method") != "lrsd":
        raise CheckpointError(f"{directory} is not compressed by lrsd; nothing to export")
    packed = LrsdConfig(**packing)
    formats = packed.formats()
    corrected = [name for name, layout in formats.items() if layout.added_bias]
    if corrected:
        raise CheckpointError(
            f"{len(corrected)} layers carry a bias that the dense model has no place for, {corrected[0]} "
            "among them; compress without --mean-correction to export"
        )
    owners = {name: tensor.shard for name, tensor in take_inventory(directory).items()}
    shards = sorted(set(owners.values()))
    files = {
        shard: f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) > 1
        else "model.safetensors"
        for number, shard in enumerate(shards, 1)
    }
    weight_map: dict[str, str] = {}
    total = 0
    with new_directory(target) as aside:
        for shard, name in files.items():
            tensors = _dense_tensors(owners, shard, formats, packed, progress)
            write_tensors(aside / name, tensors, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(aside / INDEX_NAME, index)
        write_json(aside / "config.json", config)
        for path in directory.iterdir():
            if (
                path.suffix not in {".safetensors", ".md"}
                and path.name not in _PACKED_ONLY
                and path.is_file()
            ):
                require_inside(directory, path)
                with refusals(aside):
                    shutil.copy2(path, aside / path.name)
    return total


_PACKED_ONLY = {"config.json", MANIFEST_NAME, RUN_NAME, RECIPE_NAME, INDEX_NAME}


def _dense_tensors(
    owners: dict[str, Path],
    shard: Path,
    formats: dict[str, LayerFormat],
    packed: LrsdConfig,
    progress: Callable[[str], None],
) -> dict[str, torch.Tensor]:
    """The tensors of one shard, those of packed layers unpacked beside their `weight`, fused experts beside
    the first of them."""
    dense: dict[str, torch.Tensor] = {}
    parts = {
        f"{experts}.{part}": (f"{experts}.{fused}", fusion["transposed"])
        for experts, fusion in packed.experts.items()
        for fused, part in fused_names(gated=fusion["gated"]).items()
    }
    with safe_open(shard, framework="pt") as file:
        for key in sorted(file.keys()):
            layer, _, part = key.rpartition(".")
            experts, _, number = layer.rpartition(".")
            if experts in parts:
                if number == "0" and part in ("weight", "bias"):
                    name, transposed = parts[experts]
                    values = _experts_values(owners, experts, part, formats)
                    dense[name if part == "weight" else f"{name}_bias"] = (
                        fused_weight(values, transposed=transposed)
                        if part == "weight"
                        else torch.stack(values)
                    )
                    progress(experts)
            elif layer in packed.embeddings:
                if part == "weight":
                    scales, codes = _read_tensor(owners, f"{layer}.scales"), file.get_tensor(key)
                    if scales.shape != codes.shape[:1]:
                        raise CheckpointError(
                            f"{layer} has {len(codes)} rows and {tuple(scales.shape)} scales"
                        )
                    dense[key] = codes.to(scales.dtype) * scales[:, None]
            elif layer not in formats:
                dense[key] = file.get_tensor(key)
            elif part == "weight":
                module = _read_packed(layer, formats[layer], owners).to_dense(file.get_tensor(key).dtype)
                dense |= {
                    f"{layer}.{name}": value.contiguous() for name, value in module.state_dict().items()
                }
                progress(layer)
    return dense


def _experts_values(
    owners: dict[str, Path], experts: str, part: str, formats: dict[str, LayerFormat]
) -> list[torch.Tensor]:
    """Weight or bias of every expert of one list, in order, dense."""
    values = []
    for number in range(
        len({k.split(".")[experts.count(".") + 1] for k in owners if k.startswith(f"{experts}.")})
    ):
        layer = f"{experts}.{number}"
        value = _read_tensor(owners, f"{layer}.{part}")
        if layer in formats and part == "weight":
            value = _read_packed(layer, formats[layer], owners).dense_weight(value.dtype)
        values.append(value)
    return values


def _read_tensor(owners: dict[str, Path], key: str) -> torch.Tensor:
    if key not in owners:
        raise CheckpointError(f"the checkpoint lacks {key}; it is incomplete: copy or compress it again")
    with safe_open(owners[key], framework="pt") as file:
        return file.get_tensor(key)


def _read_packed(layer: str, layout: LayerFormat, owners: dict[str, Path]) -> LowRankSparseLinear:
    """One packed layer from the shards, wherever its tensors are."""
    tensors = {}
    for key, shard in owners.items():
        if key.rpartition(".")[0] == layer:
            with safe_open(shard, framework="pt") as file:
                tensors[key.rpartition(".")[2]] = file.get_tensor(key)
    missing = {"weight", "coefficients"} - set(tensors)
    if missing:
        raise CheckpointError(f"layer {layer} lacks its {' and '.join(sorted(missing))}")
    try:
        rank, free_columns = tensors["weight"].shape
        out_features = tensors["coefficients"].shape[0] + layout.rows + (rank if layout.pivoted else 0)
        in_features = free_columns + (0 if layout.entries is not None else layout.columns)
        with torch.device("meta"):
            packed = LowRankSparseLinear(Shape(out_features, in_features), layout, tensors["weight"].dtype)
        for name, expected in packed.state_dict().items():
            found = tensors[name]
            fits = (
                found.is_floating_point() if expected.is_floating_point() else found.dtype == expected.dtype
            )
            if found.shape != expected.shape or not fits:
                raise ValueError(f"{name} is {found.dtype} {tuple(found.shape)}, not {tuple(expected.shape)}")
        packed.load_state_dict(tensors, assign=True)
        packed.check(layer)
    except (KeyError, RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"layer {layer} does not match its entry in config.json: {error}") from error
    return packed
