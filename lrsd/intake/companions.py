"""What stands beside the weights in a model directory: tokenizer, processor, pooling, prompts, licence."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from lrsd.errors import InputError
from lrsd.intake.json import CONFIG_NAME, NO_LIMIT_DIGITS, parse_json, require_inside
from lrsd.work.files import refusals

# Weights of whatever format, archives, and pickles; and code: none of it is a companion.
WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".hdf5", ".keras", ".msgpack", ".gguf", ".ggml",
    ".onnx", ".onnx_data", ".tflite", ".npz", ".npy", ".ot", ".pb", ".engine", ".nemo", ".pkl", ".pickle",
    ".joblib", ".dill", ".tar", ".tgz", ".zip", ".7z", ".gz", ".bz2", ".xz", ".zst",
}  # fmt: skip
CODE = {
    ".py", ".pyc", ".pyw", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".ps1", ".js", ".jar",
    ".ipynb", ".whl", ".egg",
}  # fmt: skip
_INDEX, _TENSORS = ".index.json", ".safetensors"
# The list of a sentence-transformers model's parts, some of which hold weights of their own (2_Dense).
_MODULES = "modules.json"
# Where settings name classes of a model's own code.
AUTO_MAP = "auto_map"
# Bytes of a JSON file of settings; vocabularies are larger.
_LARGEST_SETTINGS = 2**23
# Bytes of all of them together; a tokenizer of 256,000 tokens takes 35 MB.
_MOST_BYTES = 2**30


def companions(directory: Path) -> Iterator[Path]:
    """Files to keep, relative to the directory, folders included: all but weights, code, pickles, config.json
    and what is hidden. A folder that holds weights is another model's, or the same one's in another format,
    unless modules.json names it.

    Raises: CheckpointError for a link that leads out of the directory; InputError for linked folders, for
    weights of a part that are pickles, and if all that is too large to belong to a model.
    """
    parts, total = _parts_of_a_sentence_model(directory), 0
    for place, folders, names in os.walk(directory):
        folder = Path(place)
        part = folder.relative_to(directory).as_posix() in parts
        if folder != directory and _holds_weights(folder, names, part=part) and not part:
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
        for name in folders:
            if require_inside(directory, folder / name).is_symlink():
                raise InputError(f"{folder / name} is a link to a folder; put the folder itself there")
        for name in sorted(names):
            path = folder / name
            if path == directory / CONFIG_NAME or not path.is_file() or not _is_companion(name, part=part):
                continue
            total += require_inside(directory, path).stat().st_size
            if total > _MOST_BYTES:
                raise InputError(
                    f"{directory} holds more than {_MOST_BYTES:,} bytes besides weights and code, up to "
                    f"{path}; move elsewhere what is no part of the model"
                )
            yield path.relative_to(directory)


def copy_companions(directory: Path, target: Path, *, renamed: dict[str, str]) -> None:
    """Copy them into another directory, over what is there.

    renamed: names that mean something else there, and what to call the file instead; "" leaves it out.
    Raises: like `companions`, and StorageError.
    """
    for path in companions(directory):
        if name := renamed.get(path.as_posix(), path.as_posix()):
            try:
                source = (directory / path).open("rb")
            except OSError as error:
                raise InputError(f"{directory / path} cannot be read: {error.strerror}") from error
            with source, refusals(target):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                with (target / name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)
                _forget_code(target / name)


def _forget_code(path: Path) -> None:
    """Classes of code that came with the model, which is not kept, go out of a JSON file's settings."""
    if path.suffix != ".json" or path.stat().st_size > _LARGEST_SETTINGS:
        return
    try:
        content = parse_json(path.read_text(encoding="utf-8"), NO_LIMIT_DIGITS)
    except ValueError:
        return  # none of ours
    if isinstance(content, dict) and content.pop(AUTO_MAP, None) is not None:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_companion(name: str, *, part: bool) -> bool:
    """part: whether it is in the folder of a part, whose safetensors are companions."""
    kinds = _kinds(name)
    if name.startswith(".") or name.endswith(_INDEX):
        return False
    return (part and kinds == {_TENSORS}) or not kinds & (WEIGHTS | CODE)


def _holds_weights(folder: Path, names: list[str], *, part: bool) -> bool:
    """Raises: InputError for a part's weights that are no safetensors."""
    found = [name for name in names if _kinds(name) & WEIGHTS]
    if part and found and not any(_kinds(name) == {_TENSORS} for name in found):
        raise InputError(
            f"{folder / found[0]} holds a part's weights in a format that is not read, since pickles can run "
            "code; convert it to safetensors first (sentence-transformers' save does)"
        )
    return bool(found)


def _kinds(name: str) -> set[str]:
    """What its endings say, of model.onnx.data and tokens.pkl.xz too."""
    return {suffix.lower() for suffix in Path(name).suffixes} & (WEIGHTS | CODE)


def _parts_of_a_sentence_model(directory: Path) -> set[str]:
    """Folders that modules.json names."""
    path = directory / _MODULES
    if not path.is_file():
        return set()
    try:
        content = parse_json(require_inside(directory, path).read_text(encoding="utf-8"))
        return {PurePosixPath(entry["path"]).as_posix() for entry in content} - {"."}
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is no list of modules with a path each: {error}") from error
