"""Texts of four kinds without a download, each in two halves that share no document and no long paragraph.

- prose: the articles of a WikiText file.
- manual: the help topics that Python brings (pydoc_data.topics).
- code: modules of the standard library that hold no interactive session.
- sessions: the interactive sessions (>>> and the answers) in the other modules' strings. They stand in for
  dialogue: turns of a person and a machine, but program text and output, not people's talk.

What they hold depends on the version of Python.
"""

import ast
import doctest
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from pydoc_data.topics import topics
from random import Random

KINDS = ("prose", "manual", "code", "sessions")
# Characters of a document to evaluate on, from its middle, so that a dozen windows see a dozen documents.
_EXCERPT = 3000
# Modules of code, evenly of all that there are: the whole library is ten million characters.
_MODULES = 200
# Characters from which on a paragraph of both halves is left out of the evaluation; shorter ones are idiom.
_LONG = 40


def write_halves(prose: Path, folder: Path) -> dict[str, tuple[str, str]]:
    """By kind, the files of its calibration and its evaluation half: every other document each."""
    folder.mkdir(parents=True, exist_ok=True)
    articles = re.split(r"\n(?= = [^=])", prose.read_text(encoding="utf-8"))
    documents: dict[str, Iterable[str]] = dict(
        zip(KINDS, (articles, topics.values(), _modules(), _sessions()), strict=True)
    )
    written = {}
    for kind, texts in documents.items():
        shuffled = list(texts)
        Random(0).shuffle(shuffled)
        calibration = "\n\n".join(shuffled[::2])
        seen = set(_paragraphs(calibration))
        evaluation = "\n\n".join(_excerpt(text, seen) for text in shuffled[1::2])
        files = {"calib": calibration, "eval": evaluation}
        for use, text in files.items():
            (folder / f"{kind}.{use}.txt").write_text(text + "\n", encoding="utf-8")
        written[kind] = (str(folder / f"{kind}.calib.txt"), str(folder / f"{kind}.eval.txt"))
    return written


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in re.split(r"\n\s*\n", text) if part.strip()]


def _excerpt(document: str, seen: set[str]) -> str:
    """Paragraphs from the middle of a document on, up to the length of an excerpt, those seen left out."""
    new = [part for part in _paragraphs(document) if len(part) <= _LONG or part not in seen]
    spare = (sum(map(len, new)) - _EXCERPT) // 2
    while new and spare >= len(new[0]):
        spare -= len(new.pop(0))
    kept = list(accumulate(map(len, new), initial=0))
    return "\n\n".join(part for part, before in zip(new, kept, strict=False) if before < _EXCERPT)


def _library() -> Iterator[tuple[Path, str]]:
    """The standard library's modules and their sources, the help topics and foreign packages left out."""
    root = Path(os.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if not {"site-packages", "dist-packages", "pydoc_data"} & set(path.relative_to(root).parts):
            try:
                yield path, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def _modules() -> Iterable[str]:
    sources = [text for path, text in _library() if ">>>" not in text and "test" not in path.parts]
    long = [text for text in sources if len(text) > _EXCERPT]
    return long[:: max(1, len(long) // _MODULES)]


def _sessions() -> Iterator[str]:
    """One per string that holds one; examples that came before are left out."""
    parse, seen = doctest.DocTestParser().get_examples, set()
    for _, source in _library():
        for text in _strings(source) if ">>> " in source else ():
            try:
                examples = [(example.source, example.want) for example in parse(text)]
            except ValueError:  # not indented as a session is
                continue
            new = [example for example in dict.fromkeys(examples) if example not in seen]
            seen.update(new)
            yield "".join(
                f">>> {typed.rstrip().replace(chr(10), chr(10) + '... ')}\n{want}" for typed, want in new
            )


def _strings(source: str) -> Iterator[str]:
    with warnings.catch_warnings(action="ignore"):  # of escapes, in the library's own tests
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # which hold such files, too
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and ">>> " in node.value:
            yield node.value
