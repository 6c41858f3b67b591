"""What `fuzz.py` reads: good files, made once, and the ways in which a case damages them."""

import json
import math
import os
import pickle
import pydoc_data.topics
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lrsd.compress import compress
from lrsd.progress import Progress
from lrsd.recipe import Recipe
from lrsd.work.journal import partial_directory

# Every value of the weights that lie outside of a case's directory.
OUTSIDE_VALUE = 7.5
_INDEX = "model.safetensors.index.json"
_NUMBERS = (
    0,
    -1,
    1,
    3,
    7,
    2**15,
    2**31,
    2**63,
    10**9,
    10**12,
    10**30,
    -(10**9),
    0.5,
    1e308,
    math.nan,
    math.inf,
)
_SIZES = (10**4, 10**6, 10**7, 10**9, 10**12, 2**63, -1, 0)
_TEXTS = (
    "",
    "x",
    "../x",
    "/dev/zero",
    "\ud800",
    "\0",
    "é" * 1000,
    "F64",
    "I64",
    "BOOL",
    "auto",
    "float8_e4m3fn",
)


@dataclass(frozen=True)
class Fixtures:
    """Directories: base holds the good files, case the damaged copy, exported what is written from it."""

    root: Path

    base = property(lambda self: self.root / "base")
    case = property(lambda self: self.root / "case")
    outside = property(lambda self: self.root / "outside")
    exported = property(lambda self: self.root / "exported")
    canary = property(lambda self: self.root / "the canary ran")
    trace = property(lambda self: self.root / "trace")

    def copy(self, name: str) -> Path:
        """A fresh case."""
        shutil.rmtree(self.case, ignore_errors=True)
        return Path(shutil.copytree(self.base / name, self.case))


class _Stop(Progress):
    """Ends a run amid its fit, so that its journal stays."""

    def stage(self, name: str, steps: int) -> None:
        self.name = name

    def step(self, what: str) -> None:
        if self.name == "compress":
            raise KeyboardInterrupt


def make_fixtures(root: Path) -> Fixtures:
    fixtures = Fixtures(root)
    base = fixtures.base
    (base / "text").mkdir(parents=True)
    english = "\n\n".join(pydoc_data.topics.topics.values())[:60_000]
    text = base / "text" / "text.txt"
    text.write_text(english, encoding="utf-8")
    tokenizer = _tokenizer(text)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, bos_token_id=0,
        eos_token_id=1, dtype=torch.bfloat16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    for name, size in (("dense", "5GB"), ("sharded", "60KB")):
        model.save_pretrained(base / name, max_shard_size=size)
        tokenizer.save_pretrained(base / name)
    (base / "gguf").mkdir()
    _write_gguf(base / "gguf" / "model.gguf", model, tokenizer)

    def compressed(name: str, progress: Progress | None = None, **settings: Any) -> None:
        chosen = Recipe.of(device="cpu", calib=str(text), samples=8, seqlen=32, **settings)
        compress(str(base / "dense"), base / name, chosen, progress)

    compressed("entropy", ratio=3.0, scope="checkpoint")
    compressed("fixed", ratio=2.5, coding="fixed", shard_size="50KB")
    compressed("plain", ratio=1.25, bits="16")
    try:
        compressed("journal", _Stop(), ratio=1.25, bits="16")
    except KeyboardInterrupt:
        partial_directory(base / "journal").rename(base / "journal")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(OUTSIDE_VALUE)
    model.save_pretrained(fixtures.outside, max_shard_size="60KB")
    model.save_pretrained(fixtures.outside)
    pairs = [
        json.dumps({"text": line, "source": line, "target": line, "label": 1}) for line in english.split("\n")
    ]
    (base / "text" / "rows.jsonl").write_text("\n".join(pairs[:99]))
    (base / "text" / "rows.csv").write_text("text,label\n" + 'good,1\n"bad, really",0\n' * 50)
    save_file({"input_features": torch.randn(2, 8, 20)}, base / "text" / "features.safetensors")
    (base / "recipe").mkdir()
    shutil.copy(base / "fixed" / "recipe.json", base / "recipe")
    return fixtures


def _tokenizer(text: Path) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train([str(text)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def _write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_name("fixture")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([3, 3] + [1] * (config.vocab_size - 2))
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight",)) or name, weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- damage of any file -----------------------------------------------------------------------------


def damage_bytes(path: Path, rng: Random) -> None:
    """Flips, cuts, insertions, or an absurd length of a safetensors header."""
    content = bytearray(path.read_bytes())
    way = rng.randrange(6)
    if way == 0:
        for _ in range(rng.choice((1, 10, 1000))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif way == 1:
        del content[rng.randrange(len(content)) :]
    elif way == 2:
        place = rng.randrange(len(content))
        content[place:place] = rng.randbytes(rng.choice((1, 8, 1000)))
    elif way == 3:
        first = rng.randrange(len(content))
        del content[first : first + rng.choice((1, 8, 1000))]
    elif way == 4:
        content[:8] = struct.pack("<Q", rng.choice((0, 1, 10**6, 99_999_999, 10**9, 2**31, 2**63, 2**64 - 1)))
    else:
        place = rng.randrange(min(2000, len(content)))
        content[place : place + 4] = rng.choice(
            (b"\xff\xfe\xff\xff", b"\0\0\0\0", b"[" * 100_000, b"9" * 5000, b"NaN,")
        )
    replace(path, bytes(content))


def hostile(rng: Random, old: Any = None) -> Any:
    """A value of any type."""
    way = rng.randrange(8)
    if way == 0 and isinstance(old, int | float):
        return old * rng.choice((-1, 2, 10, 0.5, 10**6)) + rng.choice((0, 1, -1))
    simple: list[Any] = [None, True, False, [], {}, [None], {"x": {}}, [[[]]], *_NUMBERS, *_TEXTS]
    if way == 1:
        return [rng.choice(simple) for _ in range(rng.choice((1, 2, 1000)))]
    if way == 2:
        return {str(rng.choice(_TEXTS)): rng.choice(simple) for _ in range(3)}
    return rng.choice(_SIZES if way < 5 and isinstance(old, int) else simple)


def damage_json(content: Any, rng: Random) -> Any:
    """One to three places changed, removed, added or given another name."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, places = content, []
        while isinstance(at, dict | list) and at:
            key: Any = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
            places.append((at, key))
            at = at[key]
        if not places:
            return hostile(rng)
        holder, key = rng.choice((places[-1], rng.choice(places)))
        way = rng.randrange(8)
        if way == 0:
            del holder[key]
        elif way == 1 and isinstance(holder, dict):
            holder[rng.choice((*_TEXTS, f"{key}x"))] = holder.pop(key)
        elif way == 2 and isinstance(holder, dict):
            holder[f"{key}x"] = hostile(rng, holder[key])
        elif way == 3 and isinstance(holder, dict):
            holder[key] = rng.choice(list(holder.values()))
        else:
            holder[key] = hostile(rng, holder[key])
    return content


def damage_json_file(path: Path, rng: Random) -> None:
    if rng.randrange(10) == 0:
        damage_bytes(path, rng)
        return
    text = json.dumps(damage_json(json.loads(path.read_text()), rng))
    if rng.randrange(20) == 0:  # a key twice
        text = text.replace(", ", ', "hidden_size": 7, "rank": -1, ', 1)
    replace(path, text.encode())


def damage_header(path: Path, rng: Random) -> None:
    """A well-formed safetensors file with a hostile header."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    if rng.randrange(2):
        tensor = header[rng.choice([name for name in header if name != "__metadata__"])]
        first, last = tensor["data_offsets"]
        tensor |= rng.choice((
            {"dtype": rng.choice(("F64", "F32", "F16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "F4", "", "X"))},  # noqa: E501
            {"shape": [rng.choice(_SIZES) for _ in tensor["shape"]]},
            {"shape": [1] * rng.choice((0, 5, 70, 1000)) + tensor["shape"]},
            {"shape": tensor["shape"][::-1]},
            {"data_offsets": [-1, last]}, {"data_offsets": [last, first]}, {"data_offsets": [0, last - first]},  # noqa: E501
            {"data_offsets": [first, 2**63]}, {"data_offsets": [2**64 - 2, 2**64 - 1]},
            {"data_offsets": [0, 0], "shape": [0]}, {"data_offsets": [0, 0], "shape": [0, 2**62, 2**62]},
        ))  # fmt: skip
    else:
        header = damage_json(header, rng)
    encoded = json.dumps(header).encode()
    replace(path, struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


def damage_tensors(path: Path, rng: Random) -> None:
    """A sound safetensors file of wrong tensors."""
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    old = tensors[name]
    kinds = (torch.float64, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn)
    way = rng.randrange(6)
    if way == 0:
        tensors[name] = old.to(rng.choice(kinds))
    elif way == 1:
        tensors[name] = torch.full_like(
            old,
            rng.choice((-1, 0, 127, math.nan, math.inf))
            if old.is_floating_point()
            else rng.choice((0, 1, 100)),
        )
    elif way == 2:
        tensors[name] = old.new_zeros(
            [max(0, rng.choice((0, 1, size - 1, size + 1, 2 * size))) for size in old.shape]
        )
    elif way == 3:
        del tensors[name]
    elif way == 4:
        tensors[rng.choice((f"{name}x", "weight", "", "model.layers.9.mlp.up_proj.weight"))] = old.clone()
    else:
        tensors[name] = (
            old.flatten()[torch.randperm(old.numel())].view_as(old) if old.numel() < 10**5 else old * 2
        )
    replace(path)
    save_file(tensors, path, {"format": "pt"})


def damage_codes(case: Path, rng: Random) -> None:
    """Codes, indices or steps: their bytes, or a DEFLATE bomb of the length that config.json says."""
    path = rng.choice(sorted(case.glob("*.safetensors")))
    tensors = load_file(path)
    names = [
        name
        for name in tensors
        if name.endswith((".codes", ".pivots", ".columns", ".steps", ".zeros", ".scales"))
    ]
    if not names:
        return
    name = rng.choice(names)
    content = bytearray(tensors[name].view(torch.uint8).numpy().tobytes())
    if rng.randrange(4) == 0 and name.endswith(".codes"):
        bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
        body = bomb.compress(bytes(rng.choice((10**6, 10**8)))) + bomb.flush()
        content = bytearray(struct.pack("<BBI", rng.choice((1, 2, 3, 4)), 0, len(body)) + body)
        config = json.loads((case / "config.json").read_text())
        config["quantization_config"]["layers"][name.removesuffix(".codes")]["stream"] = len(content)
        replace(case / "config.json", json.dumps(config).encode())
        tensors[name] = torch.frombuffer(content, dtype=torch.uint8)
    else:
        for _ in range(rng.choice((1, 1, 10, 1000))):
            content[rng.choice((rng.randrange(len(content)), rng.randrange(min(8, len(content)))))] = (
                rng.randrange(256)
            )
        tensors[name] = (
            torch.frombuffer(content, dtype=torch.uint8).view(tensors[name].dtype).view(tensors[name].shape)
        )
    replace(path)
    save_file(tensors, path, {"format": "pt"})


def damage_index(case: Path, rng: Random, outside: Path) -> None:
    """Shards that lead out of the directory, by the index or by a link, or that are no files."""
    shards = sorted(path for path in case.glob("*.safetensors"))
    shard = rng.choice(shards)
    target = outside / shard.name if (outside / shard.name).exists() else outside / "model.safetensors"
    way = rng.randrange(9)
    if way < 3:  # the shard itself is no file of the directory
        shard.unlink()
        if way == 0:
            shard.symlink_to(
                rng.choice((str(target), f"../outside/{target.name}", "/dev/zero", "/dev/null", shard.name))
            )
        elif way == 1:
            os.mkfifo(shard)
        else:
            shard.mkdir()
        return
    index = json.loads((case / _INDEX).read_text())
    if way == 3:
        replace(case / _INDEX, json.dumps(damage_json(index, rng)).encode())
        return
    names = (
        str(target), f"../outside/{target.name}", f"./../outside/{target.name}", f"x/../../outside/{target.name}",  # noqa: E501
        "/dev/zero", "/dev/stdin", "/proc/self/mem", "/etc/passwd", "link.safetensors", "fifo.safetensors", "config.json", ".", "..", "", "\0",  # noqa: E501
        "~/x.safetensors", "x" * 5000, shards[0].name, "pytorch_model.bin",
    )  # fmt: skip
    (case / "link.safetensors").symlink_to(target)
    os.mkfifo(case / "fifo.safetensors")
    name = rng.choice(names)
    moved = [key for key, at in index["weight_map"].items() if at == shard.name]
    for key in moved[: rng.choice((1, 1000))]:
        index["weight_map"][key] = name
    replace(case / _INDEX, json.dumps(index).encode())
    if rng.randrange(2):
        shard.unlink()


def damage_gguf(path: Path, rng: Random) -> None:
    """Numbers of the header, most of them before the tokenizer or behind it, made absurd."""
    content = bytearray(path.read_bytes())
    begin, end = content.index(b"tokenizer."), content.index(b"token_embd.weight")
    regions = ((4, begin), (begin, end), (end - 8, end + 1500))
    for _ in range(rng.choice((1, 1, 1, 3))):
        place = rng.randrange(*rng.choice(regions))
        way = rng.randrange(4)
        if way == 0:
            content[place] ^= 1 << rng.randrange(8)
        elif way == 1:
            content[place] = rng.randrange(14)  # a type
        else:
            letter = rng.choice("IQ")
            number = rng.choice((0, 1, 2, 1000, 10**6, 10**9, 2**31, 2**32 - 1, 10**12, 2**63, 2**64 - 1))
            struct.pack_into(f"<{letter}", content, place, number % 2 ** (8 * struct.calcsize(letter)))
    replace(path, bytes(content))


def replace(path: Path, content: bytes = b"") -> None:
    path.unlink()
    path.write_bytes(content)


# --- cases ------------------------------------------------------------------------------------------


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def dense_shard(fixtures: Fixtures, rng: Random) -> None:
    case = fixtures.copy(rng.choice(("dense", "sharded")))
    rng.choice((damage_bytes, damage_header, damage_tensors))(
        rng.choice(sorted(case.glob("*.safetensors"))), rng
    )


def dense_index(fixtures: Fixtures, rng: Random) -> None:
    damage_index(fixtures.copy("sharded"), rng, fixtures.outside)


def config(fixtures: Fixtures, rng: Random) -> None:
    case = fixtures.copy("dense")
    if rng.randrange(2):
        content = json.loads((case / "config.json").read_text())
        for name in rng.sample(
            [name for name, value in content.items() if isinstance(value, int)], rng.choice((1, 1, 2))
        ):
            content[name] = rng.choice((*_SIZES, *_NUMBERS))
        replace(case / "config.json", json.dumps(content).encode())
    else:
        damage_json_file(case / "config.json", rng)


def side_file(fixtures: Fixtures, rng: Random) -> None:
    case = fixtures.copy("dense")
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    path = case / rng.choice(names)
    if rng.randrange(12) == 0:
        path.unlink()
        rng.choice((path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")))()
    else:
        damage_json_file(path, rng)


def program(fixtures: Fixtures, rng: Random) -> None:
    """A pickle or code of the model's own, where a loader could look for it."""
    case = fixtures.copy(rng.choice(("dense", "sharded", "fixed")))
    names = (
        "pytorch_model.bin",
        "model.pt",
        "adapter_model.bin",
        "model.pth",
        "consolidated.00.pth",
        "training_args.bin",
    )
    shards = sorted(case.glob("*.safetensors"))
    for name in (*names, shards[0].name)[rng.randrange(7) :][:3]:
        (case / name).unlink(missing_ok=True)
        (case / name).write_bytes(pickle.dumps(_Canary(fixtures.canary)))
    if rng.randrange(2):
        for shard in case.glob("*.safetensors"):
            shard.unlink()
    (case / "evil.py").write_text(f"from pathlib import Path\nPath({str(fixtures.canary)!r}).touch()\n")
    for file, kinds in (
        ("config.json", ("AutoConfig", "AutoModelForCausalLM")),
        ("tokenizer_config.json", ("AutoTokenizer",)),
    ):
        content = json.loads((case / file).read_text())
        content["auto_map"] = dict.fromkeys(kinds, "evil.Evil")
        if rng.randrange(2):
            content |= {"model_type": "evil", "tokenizer_class": "Evil", "architectures": ["Evil"]}
        replace(case / file, json.dumps(content).encode())


def gguf(fixtures: Fixtures, rng: Random) -> None:
    rng.choice((damage_gguf, damage_gguf, damage_bytes))(fixtures.copy("gguf") / "model.gguf", rng)


def packed_config(fixtures: Fixtures, rng: Random) -> None:
    case = fixtures.copy(rng.choice(("entropy", "fixed", "plain")))
    content = json.loads((case / "config.json").read_text())
    packing = content["quantization_config"]
    way = rng.randrange(3)
    if way == 0:
        content["quantization_config"] = damage_json(packing, rng)
    elif way == 1:
        packing["layers"] = damage_json(packing["layers"], rng)
    else:
        entry = packing["layers"][rng.choice(sorted(packing["layers"]))]
        if rng.randrange(3) == 0:  # as in format version 1
            terms = entry.pop("terms")
            entry |= {key: value for term in terms for key, value in term.items() if key != "form"}
        elif entry["terms"] and rng.randrange(2):
            entry = rng.choice(entry["terms"])
        fields = (
            "rank",
            "columns",
            "rows",
            "entries",
            "stream",
            "exponent",
            "bits",
            "group",
            "pivoted",
            "bias",
            "added_bias",
            "transposed",
        )
        entry[rng.choice(fields)] = rng.choice((*_SIZES, 1, 2, 8, 64, 1000, True, None, "1", math.nan))
    replace(case / "config.json", json.dumps(content).encode())


def packed_shard(fixtures: Fixtures, rng: Random) -> None:
    case = fixtures.copy(rng.choice(("entropy", "fixed", "plain")))
    if rng.randrange(2):
        damage_codes(case, rng)
    else:
        rng.choice((damage_bytes, damage_header, damage_tensors))(
            rng.choice(sorted(case.glob("*.safetensors"))), rng
        )


def packed_index(fixtures: Fixtures, rng: Random) -> None:
    damage_index(fixtures.copy("fixed"), rng, fixtures.outside)


def manifest(fixtures: Fixtures, rng: Random) -> None:
    damage_json_file(fixtures.copy("entropy") / rng.choice(("lrsd.json", "run.json")), rng)


def journal(fixtures: Fixtures, rng: Random) -> None:
    case = fixtures.copy("journal")
    if rng.randrange(2):
        lines = (case / "journal.jsonl").read_text().splitlines()
        number = rng.randrange(len(lines))
        lines[number] = json.dumps(damage_json(json.loads(lines[number]), rng))
        replace(case / "journal.jsonl", "\n".join(lines).encode() + b"\n"[: rng.randrange(2)])
        return
    path = rng.choice([path for path in sorted(case.rglob("*")) if path.is_file()])
    if path.suffix != ".safetensors" or rng.randrange(2):
        damage_bytes(path, rng)
        return
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    if "__metadata__" in header:
        header["__metadata__"]["record"] = json.dumps(
            damage_json(json.loads(header["__metadata__"]["record"]), rng)
        )
    encoded = json.dumps(header).encode()
    replace(path, struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


def text(fixtures: Fixtures, rng: Random) -> None:
    case = fixtures.copy("text")
    path = rng.choice(sorted(case.iterdir()))
    for other in case.iterdir():
        if other != path:
            other.unlink()
    way = rng.randrange(8)
    if way < 3:
        damage_bytes(path, rng)
    elif way == 3 and path.suffix == ".jsonl":
        lines = path.read_text().splitlines()
        lines[rng.randrange(3)] = json.dumps(damage_json(json.loads(lines[0]), rng))
        replace(path, "\n".join(lines).encode())
    elif way == 3 and path.suffix == ".safetensors":
        rng.choice((damage_header, damage_tensors))(path, rng)
    elif way == 4:
        replace(
            path,
            rng.choice(
                (
                    b"[" * 10**6,
                    b"1" * 5000,
                    b"a" * 10**6,
                    b"\0" * 1000,
                    b"\xff\xfe",
                    b"{}\n" * 1000,
                    b'{"text": 1}\n',
                    b"text,label\n" + b"x" * 200_000,
                )
            ),
        )
    elif way == 5:
        path.unlink()
        rng.choice(
            (
                path.mkdir,
                lambda: os.mkfifo(path),
                lambda: path.symlink_to("/dev/zero"),
                lambda: path.symlink_to(path),
            )
        )()
    elif way == 6:
        replace(path)
        os.truncate(path, rng.choice((10**8, 200 * 10**9)))
    else:
        replace(path, rng.randbytes(1000))


def recipe(fixtures: Fixtures, rng: Random) -> None:
    case = fixtures.copy("recipe")
    damage_json_file(case / "recipe.json", rng)
    if rng.randrange(4) == 0:
        (case / "recipe.json").rename(case / "recipe.toml")


KINDS: dict[str, Callable[[Fixtures, Random], None]] = {
    "shard": dense_shard, "index": dense_index, "config": config, "side": side_file, "program": program,
    "gguf": gguf,
    "packing": packed_config, "packed": packed_shard, "packed-index": packed_index,
    "export-packing": packed_config, "export": packed_shard, "export-index": packed_index,
    "manifest": manifest, "journal": journal, "text": text, "recipe": recipe,
}  # fmt: skip
