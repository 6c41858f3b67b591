"""A GGUF file from a stranger is refused from its header, before a reader acts on what it says."""

import struct
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from lrsd.errors import InputError
from lrsd.intake.gguf import read_gguf
from lrsd.model.load import load_model
from lrsd.work.process import current_rss

UINT8, UINT32, STRING, ARRAY = 0, 4, 8, 9
F32 = 0


def text(content: str) -> bytes:
    return struct.pack("<Q", len(content.encode())) + content.encode()


def field(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def entries(kind: int, count: int) -> bytes:
    return struct.pack("<IQ", kind, count)


def tensor(name: str, shape: tuple[int, ...], offset: int, kind: int = F32) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(*parts: bytes, fields: int = 0, tensors: int = 0, version: int = 3, data: int = 4096) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + b"".join(parts)
    return header + bytes(-len(header) % 32 + data)


ARCHITECTURE = field("general.architecture", STRING, text("llama"))
WEIGHT = tensor("token_embd.weight", (32, 32), 0)
HOSTILE = {
    "another kind": (b"PK\3\4" + bytes(1000), "does not begin with GGUF"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version is 50331648"),
    "cut off": (file(ARCHITECTURE, fields=1)[:40], "ends within its header"),
    "fields without end": (file(ARCHITECTURE, fields=2**60), "1,152,921,504,606,846,976 fields"),
    "a key beyond the file": (file(struct.pack("<Q", 2**62), fields=1), "ends within its header"),
    "a list without end": (
        file(field("x", ARRAY, entries(UINT8, 2**60)), fields=1),
        "1,152,921,504,606,846,976 entries",
    ),
    "a list beyond the file": (file(field("x", ARRAY, entries(UINT32, 4000)), fields=1), "ends within"),
    "a million entries, all there": (
        file(field("x", ARRAY, entries(UINT8, 10**6)) + bytes(10**6), fields=1),
        "1,000,000 entries, at most 19,",
    ),
    "a token without end": (
        file(field("x", ARRAY, entries(STRING, 1) + text("x" * 400_000)), fields=1),
        "tokens should have 400,000 bytes",
    ),
    "lists of lists": (file(field("x", ARRAY, entries(ARRAY, 1)), fields=1), "list of type 9"),
    "an unknown type": (file(field("x", 77, b""), fields=1), "field of type 77"),
    "no text": (file(struct.pack("<Q", 1) + b"\xff", fields=1), "can't decode"),
    "blocks without end": (
        file(ARCHITECTURE, field("llama.block_count", UINT32, struct.pack("<I", 10**9)), fields=2),
        "llama.block_count is 1,000,000,000",
    ),
    "a tensor beyond the file": (file(tensor("a", (32, 33), 0), tensors=1), "take 4,224 bytes, 4,096"),
    "a huge tensor": (file(tensor("a", (2**62, 2**62), 0), tensors=1), "it is cut off"),
    "one tensor's bytes for two": (file(WEIGHT, tensor("b", (32,), 4092), tensors=2), "overlap"),
    "a tensor twice": (file(WEIGHT, WEIGHT, tensors=2), "is there twice"),
    "a type of tensor from nowhere": (file(tensor("a", (1,), 0, kind=999), tensors=1), "999"),
    "dimensions without end": (
        file(text("a") + struct.pack("<I", 2**31), tensors=1),
        "2147483648 dimensions",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_refused_by_name_at_once(case: str, tmp_path: Path) -> None:
    content, says = HOSTILE[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    before, start = current_rss(), time.perf_counter()
    with pytest.raises(InputError, match=f"model.gguf is not a readable GGUF file: .*{says}") as caught:
        load_model(str(path))
    assert time.perf_counter() - start < 5
    assert current_rss() - before < 500e6
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("alignment", [None, 256])
def test_a_good_header_is_read_as_the_reader_reads_it(tmp_path: Path, alignment: int | None) -> None:
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(1)
    writer.add_rope_freq_base(1e4)
    writer.add_bool("llama.flag", True)
    writer.add_token_list(["a", "é", ""])
    writer.add_token_scores([0.0, -1.0, 2.5])
    writer.add_tensor("token_embd.weight", np.zeros((3, 64), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(64, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = {t.name: (tuple(t.shape.tolist())[::-1], t.tensor_type.name) for t in GGUFReader(path).tensors}
    assert {name: (t.shape, t.dtype) for name, t in read_gguf(path).tensors.items()} == read
