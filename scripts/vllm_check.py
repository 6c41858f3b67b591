"""What a checkpoint answers in vLLM beside what it answers in transformers.

In an environment with vLLM (and lrsd, for its own format) it writes greedy tokens and the prompts'
log-probabilities, and prints tokens per second; with --compare, in one with transformers, it says how far
these are from its own.
Example:
  python scripts/vllm_check.py smol-4x answers.json
  python scripts/vllm_check.py smol-4x answers.json --compare
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

PROMPTS = (
    "The capital of France is",
    "In the beginning",
    "def add(a, b):",
    "Water boils at a temperature of",
)
NEW = 24


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("model")
    options.add_argument("answers", type=Path)
    options.add_argument("--compare", action="store_true")
    args = options.parse_args()
    if args.compare:
        compare(args.model, json.loads(args.answers.read_text()))
    else:
        args.answers.write_text(json.dumps(answers(args.model)))


def answers(model: str) -> list[dict[str, Any]]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    engine = LLM(model, enforce_eager=True, max_model_len=512, dtype="bfloat16")
    greedy = SamplingParams(temperature=0, max_tokens=NEW, prompt_logprobs=1)
    found = []
    for answer in engine.generate(list(PROMPTS), greedy, use_tqdm=False):
        prompt = answer.prompt_token_ids
        known = zip(answer.prompt_logprobs[1:], prompt[1:], strict=True)
        logprobs = [at[token].logprob for at, token in known]
        found.append({"prompt": prompt, "new": list(answer.outputs[0].token_ids), "logprobs": logprobs})
    timed = SamplingParams(temperature=0, max_tokens=32, min_tokens=32)
    for batch in (1, 16):
        start = time.perf_counter()
        engine.generate(["Once upon a time"] * batch, timed, use_tqdm=False)
        print(f"batch {batch}: {32 * batch / (time.perf_counter() - start):.1f} tokens/s", flush=True)
    return found


def compare(model: str, found: list[dict[str, Any]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    import lrsd  # noqa: F401 - registers the loader

    own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    differences, same = [], 0
    for answer in found:
        prompt = torch.tensor([answer["prompt"]])
        with torch.inference_mode():
            logprobs = own(prompt).logits.float().log_softmax(-1)[0]
            new = own.generate(prompt, max_new_tokens=NEW, do_sample=False)[0, prompt.shape[1] :]
        for place, (token, logprob) in enumerate(zip(answer["prompt"][1:], answer["logprobs"], strict=True)):
            differences.append(abs(float(logprobs[place, token]) - logprob))
        same += new.tolist() == answer["new"]
    mean = sum(differences) / len(differences)
    print(f"log-probabilities differ by {mean:.4f} on average, {max(differences):.4f} at most")
    print(f"the same {NEW} tokens for {same} of {len(found)} prompts")


if __name__ == "__main__":
    main()
