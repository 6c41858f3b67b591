"""A checkpoint directory appears under its name only when complete: written atomically."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor

from lrsd.errors import InputError
from lrsd.intake.companions import AUTO_MAP
from lrsd.intake.safetensors import INDEX_NAME, shard_paths
from lrsd.model.types import Model
from lrsd.work.files import PARTIAL, refusals, sync, write_json, write_tensors
from lrsd.work.residency import MappedFiles


def write_model(model: Model, directory: Path, shard_size: str) -> None:
    """What `save_pretrained` writes, to the byte, with no more than one shard in memory of what is mapped
    from files. Raises: StorageError.
    """
    with refusals(directory):
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        vars(model.config).pop(AUTO_MAP, None)
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


def rewrite_shards(directory: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    """Write the shards of a directory anew, one at a time, with what `change` makes of every tensor's name
    and value: in the same files, at the same places where shapes and types are the same.

    Raises: StorageError.
    """
    for shard in shard_paths(directory):
        with safe_open(shard, framework="pt") as file:
            metadata = file.metadata()
            # None of them is mapped from the file that is exchanged.
            names = list(file.keys())
            tensors = {name: change(name, file.get_tensor(name)).clone() for name in names}
        write_tensors(shard, tensors, metadata)


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
    """A directory written atomically: it appears under its name only when complete."""
    require_place(target)
    require_free(target)
    target = target.absolute()
    with refusals(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=PARTIAL, dir=target.parent))
    try:
        yield temporary
        publish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish(written: Path, target: Path) -> None:
    """Sync a directory, or a file, and let it appear under another name. Raises: StorageError."""
    with refusals(target):
        for path in (*written.rglob("*"), written):
            sync(path)
        if written.is_dir():
            written.chmod(0o755)
        if target.is_dir():
            target.rmdir()
        written.rename(target)
        sync(target.absolute().parent)
