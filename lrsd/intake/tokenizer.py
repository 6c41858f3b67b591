"""An untrusted tokenizer's files, before anything reads them."""

from pathlib import Path

from lrsd.errors import InputError
from lrsd.intake.json import NO_LIMIT_DIGITS, read_json
from lrsd.intake.lfs import refuse_pointer

# Times by which a tokenizer's replacements could together lengthen a text, each feeding the next: eight that
# put a character between blanks stay below. What the loader tries first then takes a few megabytes.
_GROWTH = 10_000
# Files of a tokenizer besides its JSON.
_VOCABULARIES = ("*.model", "*.tiktoken", "vocab.*", "merges.txt")


def _check_tokenizer(directory: Path) -> None:
    """Raises: InputError for tokenizer files of other names, for git-lfs pointers, and for replacements that
    together make a text so much longer that the first words would fill the memory."""
    for path in (path for pattern in _VOCABULARIES for path in directory.glob(pattern)):
        if path.is_file():
            refuse_pointer(path)
    settings, tokenizer = directory / "tokenizer_config.json", directory / "tokenizer.json"
    if settings.is_file() and (names := read_json(settings, NO_LIMIT_DIGITS).get("fast_tokenizer_files")):
        raise InputError(f"{settings} names tokenizer files, {names!r:.80}; only tokenizer.json is read")
    if not tokenizer.is_file():
        return
    growth, parts = 1, [read_json(tokenizer).get("normalizer")]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            if isinstance(content := part.get("content"), str):
                growth *= max(len(content), 1)
            if isinstance(inner := part.get("normalizers"), list):
                parts += inner
        if growth > _GROWTH:
            raise InputError(f"{tokenizer}: its normalizer makes a text {growth:,} times longer, or more")
