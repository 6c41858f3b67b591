"""A GGUF file made of another one: the same metadata, tokenizer and small tensors, other weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lrsd.checkpoint.manifest import GGUF_PREFIX
from lrsd.forms.ggml import Ggml
from lrsd.model.gguf import GgufSource
from lrsd.work.files import refusals, sync

# Version of the block types' layouts, as ggml counts them.
_QUANTIZATION_VERSION = 2


@dataclass(frozen=True)
class NewTensor:
    """data: values, or bytes (rows, bytes per row) of blocks; kind: ggml's number of its type."""

    name: str
    data: np.ndarray[Any, Any]
    kind: int


def new_tensors(source: GgufSource, blocks: Mapping[str, tuple[Ggml, Tensor]]) -> list[NewTensor]:
    """All tensors of the file, in order, those of the modules in `blocks` exchanged."""
    exchanged = {source.tensors[module].name: module for module in blocks}
    found = []
    for tensor in source.reader.tensors:
        if (module := exchanged.get(tensor.name)) is None:
            found.append(NewTensor(tensor.name, tensor.data, int(tensor.tensor_type)))
        else:
            form, rows = blocks[module]
            data = source.tensors[module].as_in_file(rows.cpu()).numpy()
            found.append(NewTensor(tensor.name, data, form.type))
    return found


def write_gguf(reader: Any, target: Path, tensors: Sequence[NewTensor], texts: Mapping[str, str]) -> None:
    """Write the new file `target` with the metadata of another, open in a GGUFReader, and these tensors.

    texts: metadata under "lrsd.", instead of what the other has there. Raises: StorageError.
    """
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, Keys

    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    architecture = fields.pop(Keys.General.ARCHITECTURE).contents()
    with refusals(target):
        writer = GGUFWriter(target, architecture)
        for name, field in fields.items():
            own = (Keys.General.FILE_TYPE, Keys.General.QUANTIZATION_VERSION, Keys.General.ALIGNMENT)
            # The writer knows no empty list, which says as much as none.
            empty = field.types == [GGUFValueType.ARRAY]
            if name not in own and not name.startswith(GGUF_PREFIX) and not empty:
                kind = field.types[0]
                sub_type = field.types[-1] if kind == GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), kind, sub_type=sub_type)
        if Keys.General.ALIGNMENT in fields:
            writer.add_custom_alignment(fields[Keys.General.ALIGNMENT].contents())
        writer.add_file_type(_file_type(tensors))
        writer.add_quantization_version(_QUANTIZATION_VERSION)
        for name, text in texts.items():
            writer.add_string(f"{GGUF_PREFIX}{name}", text)
        for tensor in tensors:
            writer.add_tensor_info(
                tensor.name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes,
                GGMLQuantizationType(tensor.kind),
            )  # fmt: skip
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.data)
        writer.close()
        sync(target)


def _file_type(tensors: Sequence[NewTensor]) -> int:
    """llama.cpp's name for a file, here that of the type which most bytes are of."""
    from gguf import GGMLQuantizationType, LlamaFileType

    totals: dict[int, int] = {}
    for tensor in tensors:
        if tensor.data.ndim > 1:
            totals[tensor.kind] = totals.get(tensor.kind, 0) + tensor.data.nbytes
    name = GGMLQuantizationType(max(totals, key=totals.__getitem__)).name if totals else "F32"
    for known in (f"MOSTLY_{name}", f"MOSTLY_{name}_M", f"ALL_{name}"):
        if known in LlamaFileType.__members__:
            return int(LlamaFileType[known])
    return int(LlamaFileType.GUESSED)
