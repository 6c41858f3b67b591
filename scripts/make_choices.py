"""Multiple choice from any text: which of four continuations is the true one?

The text is cut, paragraph by paragraph, into stretches of --context and --continuation words that do not
overlap. A stretch drawn at random is an item; the three wrong choices end other stretches, drawn from the
--near ones on either side of it, so that they are of the same length and mostly of the same subject. Items
share no context, so that they can be drawn again as independent. The same text, numbers and seed give the
same file.

Example:
  python scripts/make_choices.py wiki.test.raw -o items.jsonl --items 400
  lrsd eval out --tasks items.jsonl
"""

import argparse
import json
from pathlib import Path
from random import Random

from lrsd.data.choices import Item

_WRONG = 3


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("text", type=Path)
    options.add_argument("-o", "--output", type=Path, required=True)
    options.add_argument("--items", type=int, default=400)
    options.add_argument("--context", type=int, default=24, help="words")
    options.add_argument("--continuation", type=int, default=6, help="words")
    options.add_argument("--near", type=int, default=16, help="stretches on either side, for wrong choices")
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    found = stretches(args.text.read_text(encoding="utf-8"), args.context, args.continuation)
    if len(found) < args.items or len(found) <= _WRONG:
        options.error(f"{args.text} has {len(found)} stretches; lower --items, or give a longer text")
    items = make_items(found, args.items, args.near, args.seed)
    lines = [json.dumps(item._asdict(), ensure_ascii=False) + "\n" for item in items]
    args.output.write_text("".join(lines), encoding="utf-8")


def stretches(text: str, context: int, continuation: int) -> list[tuple[str, str]]:
    """Context and continuation of every stretch of a text's paragraphs, in its order."""
    found, size = [], context + continuation
    for paragraph in text.splitlines():
        words = paragraph.split()
        for start in range(0, len(words) - size + 1, size):
            middle = start + context
            found.append((" ".join(words[start:middle]), " ".join(words[middle : start + size])))
    return found


def make_items(found: list[tuple[str, str]], items: int, near: int, seed: int) -> list[Item]:
    """That many of the stretches as items, in the order that they were drawn in."""
    random = Random(seed)
    made = []
    for place in random.sample(range(len(found)), items):
        context, true = found[place]
        first = min(max(0, place - near), max(0, len(found) - 2 * near - 1))
        others = list(dict.fromkeys(end for _, end in found[first : first + 2 * near + 1] if end != true))
        choices = [true, *random.sample(others, _WRONG)]
        random.shuffle(choices)
        made.append(Item(context, choices, choices.index(true)))
    return made


if __name__ == "__main__":
    main()
