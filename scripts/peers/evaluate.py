"""Perplexity, KL and top-1 agreement of a model and its dense original: torch and transformers, nothing else.

  python evaluate.py DENSE MODEL TEXT WINDOWS LENGTH LOGITS

The first windows of the text as it stands, each read by itself, after the token that the tokenizer begins
texts with, if it has one. DENSE's logits are kept in the folder LOGITS, which is made if it is not there.
"""

import json
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.inference_mode()
def logits(directory, rows):
    """Of one window after another, (tokens, vocabulary): what the stored weights say, computed in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for row in rows:
        yield model(row[None]).logits[0]


def evaluate(dense, model, text, windows, length, kept):
    """Means over all tokens but the first of each window; KL(dense || model) in nats."""
    tokenizer = AutoTokenizer.from_pretrained(dense)
    ids = tokenizer(Path(text).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False).input_ids
    begin = tokenizer("").input_ids
    rows = [torch.tensor(begin + ids[n * length : (n + 1) * length]) for n in range(windows)]
    files = [Path(kept, f"{n}.pt") for n in range(windows)]
    if not files[-1].exists():
        Path(kept).mkdir(parents=True, exist_ok=True)
        for file, found in zip(files, logits(dense, rows), strict=True):
            torch.save(found, file)
    scored = (torch.load(file) for file in files) if model == dense else logits(model, rows)
    loss = divergence = same = count = 0
    for row, file, found in zip(rows, files, scored, strict=True):
        p, q = (each[len(begin) : -1].log_softmax(-1) for each in (torch.load(file), found))
        loss -= q.gather(-1, row[len(begin) + 1 :, None]).double().sum().item()
        divergence += (p.exp() * (p - q)).sum(-1).double().sum().item()
        same += (p.argmax(-1) == q.argmax(-1)).sum().item()
        count += len(q)
    return {"perplexity": math.exp(loss / count), "KL": divergence / count, "top-1": same / count}


if __name__ == "__main__":
    *paths, windows, length, kept = sys.argv[1:]
    print(json.dumps(evaluate(*paths, int(windows), int(length), kept)))
