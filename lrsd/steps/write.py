"""The checkpoint directory: packed weights, tokenizer, manifest, model card."""

import json
import platform
import shutil
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from lrsd.checkpoint.card import model_card
from lrsd.checkpoint.manifest import (
    BASE_CARD_NAME,
    CARD_NAME,
    GGUF_MANIFEST,
    GGUF_TENSORS,
    RECIPE_NAME,
    REPORT_NAME,
    LayerRecord,
    Manifest,
    manifest_text,
    read_manifest,
    write_manifest,
)
from lrsd.checkpoint.reader import stored_bytes
from lrsd.checkpoint.verify import digest_of, digests
from lrsd.checkpoint.writer import write_model
from lrsd.errors import BudgetError, InputError
from lrsd.export import EXPORTS
from lrsd.export.compressed_tensors import require_package
from lrsd.export.gguf import new_tensors, write_gguf
from lrsd.forms.base import Shape
from lrsd.forms.ggml import BLOCK_TYPES, Ggml
from lrsd.forms.layer import Layer, parse_layer
from lrsd.intake.companions import WEIGHTS, copy_companions
from lrsd.methods.base import State
from lrsd.model.embedding import embedding_names, pack_embeddings
from lrsd.model.experts import fusions
from lrsd.model.load import resolve_device
from lrsd.model.slots import weight_slot
from lrsd.recipe import Recipe
from lrsd.runtimes.transformers import mark_packed
from lrsd.settings import parse_size
from lrsd.steps.estimate import ResourceEstimate
from lrsd.steps.fit import Fitted
from lrsd.steps.observe import Observation
from lrsd.steps.plan import Plan
from lrsd.steps.source import SourceModel
from lrsd.work.files import refusals, sync, write_json
from lrsd.work.onloading import compute_device
from lrsd.work.process import device_peak, peak_rss, rounds_products


@dataclass(frozen=True)
class Compressed:
    """What a compression came to."""

    source: SourceModel
    recipe: Recipe
    observation: Observation
    plan: Plan
    fitted: dict[str, Fitted]
    estimate: ResourceEstimate

    @property
    def shapes(self) -> dict[str, Shape]:
        return self.source.shapes


def write_result(done: Compressed, path: Path, seconds: dict[str, float]) -> None:
    """Write a new directory or file in the format asked for, and have all of it on disk.

    seconds: by phase, so far. Raises: StorageError.
    """
    if done.source.gguf is not None:
        _write_gguf(done, path, seconds)
        return
    write_checkpoint(done, path, seconds)
    convert_checkpoint(path, done.recipe.run.format)


def write_checkpoint(done: Compressed, directory: Path, seconds: dict[str, float]) -> Manifest:
    """Write the directory `directory` anew and have all of it on disk. seconds: by phase, so far.

    Raises: StorageError.
    """
    loaded, recipe = done.source.loaded, done.recipe
    embeddings = embedding_names(loaded.model) if recipe.budget.scope == "checkpoint" else ()
    pack_embeddings(loaded.model, embeddings)
    entries = {name: layer.entry for name, layer in done.fitted.items() if layer.entry is not None}
    mark_packed(loaded.model, entries, embeddings)
    with refusals(directory):
        if directory.exists():  # of a run that was stopped while it wrote
            shutil.rmtree(directory)
        directory.mkdir()
        write_model(loaded.model, directory, recipe.run.shard_size)
        if loaded.tokenizer is not None:
            loaded.tokenizer.save_pretrained(directory)
        if loaded.directory is not None:
            others = {CARD_NAME: BASE_CARD_NAME, REPORT_NAME: ""}
            copy_companions(loaded.directory, directory, renamed=others)
        write_json(directory / RECIPE_NAME, recipe.to_dict())
        files = digests(directory)
    manifest = _manifest(done, seconds, stored_bytes(directory), files)
    write_manifest(directory, manifest)
    with refusals(directory):
        card = model_card(manifest, directory / BASE_CARD_NAME)
        (directory / CARD_NAME).write_text(card, encoding="utf-8")
        for path in (*directory.rglob("*"), directory):
            sync(path)
    return manifest


def _write_gguf(done: Compressed, path: Path, seconds: dict[str, float]) -> None:
    """The file of the source with its matrices exchanged, manifest and recipe in its metadata."""
    source = done.source.gguf
    assert source is not None
    blocks = {}
    for name, layer in done.fitted.items():
        if layer.entry is not None:
            (form,) = parse_layer(name, layer.entry).terms
            assert isinstance(form, Ggml)
            blocks[name] = form, layer.tensors["blocks"]
    tensors = new_tensors(source, blocks)
    files = {GGUF_TENSORS: digest_of(tensors)}
    size = sum(tensor.data.nbytes for tensor in tensors)
    manifest = _manifest(done, seconds, size, files)
    kept = {
        name: _kept(manifest.layers[name], tensor.kind)
        for name, tensor in source.tensors.items()
        if name not in blocks
    }
    manifest = replace(manifest, layers=manifest.layers | kept)
    with refusals(path):
        path.unlink(missing_ok=True)  # of a run that was stopped while it wrote
    write_gguf(source.reader, path, tensors, {GGUF_MANIFEST: manifest_text(manifest)})
    asked = done.recipe.budget
    if asked.size is not None and path.stat().st_size > parse_size(asked.size):
        raise BudgetError(f"the file takes {path.stat().st_size:,} bytes, more than --size {asked.size}")


def _kept(record: LayerRecord, kind: int) -> LayerRecord:
    """Of a matrix that is taken from the source, where it may be blocks of integers already."""
    known = kind in {found.number for found in BLOCK_TYPES.values()}
    entry = Layer(terms=(Ggml(kind),)).to_dict() if known else None
    return replace(record, layer=entry, state=State.KEPT.value)


def _manifest(done: Compressed, seconds: dict[str, float], nbytes: int, files: dict[str, str]) -> Manifest:
    """nbytes: of all weights, as stored."""
    loaded, recipe, shapes = done.source.loaded, done.recipe, done.shapes
    added = sum(layer.choice.nbytes for layer in done.fitted.values())
    total = sum(shape.dense_bytes for shape in shapes.values())
    return Manifest(
        base_model=model_name(loaded.source),
        base_fingerprint=done.source.fingerprint,
        base_stored_as=loaded.stored_as,
        lrsd_version=version("lrsd"),
        environment=environment(recipe),
        text=done.source.text,
        recipe=json.loads(json.dumps(recipe.to_dict())),
        ratio=total / added,
        checkpoint_ratio=done.source.checkpoint_bytes / nbytes,
        linear_bytes=added,
        dense_linear_bytes=total,
        budget_bytes=done.source.budget,
        bits_per_weight=16 * added / total,
        macs_per_token=sum(_macs(layer, shapes[name]) for name, layer in done.fitted.items()),
        dense_macs_per_token=total // 2,
        allocation=done.plan.compared,
        allocation_chosen=done.plan.name,
        expected_kl=done.plan.expected_kl,
        propagated=done.plan.propagate,
        layers={name: _record(done, name, layer) for name, layer in done.fitted.items()},
        files=files,
        model_class=type(loaded.model).__name__,
        untouched=_untouched(done.source),
        seconds={phase: round(spent, 2) for phase, spent in seconds.items()},
        memory=_memory(done),
    )


def _memory(done: Compressed) -> dict[str, int]:
    """Bytes, predicted and at most: of the host, of the disk, and of an accelerator where there is one."""
    needs = done.estimate
    found = {"predicted": needs.memory, "peak": peak_rss(), "disk_predicted": needs.disk}
    if needs.device:
        found["device_predicted"] = needs.device
    if (on_device := device_peak(compute_device(done.source.loaded.model))) is not None:
        found["device_peak"] = on_device
    return found


def model_name(source: str) -> str:
    """What people call a model: its hub id, in the hub's cache too, or the name of its directory or file."""
    path = Path(source)
    if not path.exists():
        return source
    found = path.resolve() if path.is_dir() else path
    if found.parent.name == "snapshots":
        return found.parents[1].name.removeprefix("models--").replace("--", "/")
    return found.name


def require_suits(output: Path, format_: str) -> None:
    """Raises: InputError for an output whose name says something else than the format."""
    if (format_ == "gguf") != (output.suffix == ".gguf"):
        whole = output.stem if output.suffix in WEIGHTS else output.name
        raise InputError(
            f"--format {format_} writes {'one file, name it' if format_ == 'gguf' else 'a directory, not'} "
            f"{whole}.gguf"
        )


def require_convertible(source: SourceModel, format_: str) -> None:
    """Raises: InputError, before any work, if a result could not be written in that format."""
    if format_ in ("lrsd", "gguf"):  # what GGUF needs is known since the source was loaded
        return
    require_package()
    model = source.loaded.model
    turned = [name for name in source.layout.linears if weight_slot(model, name).transposed]
    for what, names in (("experts in fused tensors", list(fusions(model))), ("weights of a Conv1D", turned)):
        if names:
            raise InputError(
                f"{names[0]} has {what}, which engines do not read in format {format_}; leave out --format"
            )


def convert_checkpoint(directory: Path, format_: str) -> None:
    """Put the checkpoint at `directory` in another format, manifest, recipe and card beside it."""
    if format_ == "lrsd":
        return
    exported = directory.with_name(format_)
    with refusals(directory):
        shutil.rmtree(exported, ignore_errors=True)
    EXPORTS[format_](directory, exported, lambda name: None)
    with refusals(directory):
        for name in (RECIPE_NAME, CARD_NAME):
            shutil.copy2(directory / name, exported / name)
        manifest = read_manifest(directory)
        write_manifest(exported, replace(manifest, files=digests(exported)))
        for path in (*exported.rglob("*"), exported):
            sync(path)
        shutil.rmtree(directory)
        exported.replace(directory)


def _record(done: Compressed, name: str, layer: Fitted) -> LayerRecord:
    shape, choice = done.shapes[name], layer.choice
    return LayerRecord(
        out_features=shape.out_features,
        in_features=shape.in_features,
        layer=layer.entry,
        parameters=choice.parameters or {},
        bytes=choice.nbytes,
        dense_bytes=shape.dense_bytes,
        error=layer.error,
        predicted_error=choice.error,
        sensitivity=done.observation.sensitivity[name],
        interpolation=layer.interpolation,
        state=layer.status.state.value,
        reason=layer.status.reason,
        damping=layer.status.damping,
        history=layer.history,
        routed_tokens=done.observation.routed.get(name),
    )


def _untouched(source: SourceModel) -> dict[str, str]:
    """Linears that stay as they are, and why; not a head that is one of the matrices, or tied to one."""
    shared = set(embedding_names(source.loaded.model)) if source.embeddings else set()
    return {name: why for name, why in source.layout.untouched.items() if name not in shared}


def _macs(layer: Fitted, shape: Shape) -> int:
    """Multiply-adds per token: one for every stored value, or every weight of integers."""
    return shape.dense_bytes // 2 if layer.entry is None else parse_layer("", layer.entry).macs(shape)


def _device_name(device: torch.device) -> str:
    """The kind of device and its model, which one of several alike changes nothing; and whether it rounds."""
    if device.type != "cuda":
        return device.type
    return f"cuda {torch.cuda.get_device_name(device)}" + ", products in TF32" * rounds_products(device)


def environment(recipe: Recipe) -> dict[str, str]:
    """What a result may depend on besides its recipe: the same in all of this is the same to the byte."""
    packages = ("lrsd", "torch", "transformers", "safetensors", "tokenizers")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": _device_name(resolve_device(recipe.run.device)),
        "threads": str(torch.get_num_threads()),
    }
