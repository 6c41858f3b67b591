"""llm-compressor's GPTQ W4A16 (group 64, asymmetric, static activation order) on given tokens.

Runs in an environment of its own, see bench_peer_time.py; prints the seconds it took as JSON.
"""

import argparse
import json
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model", help="directory of dense weights")
    options.add_argument("tokens", help="safetensors file with (samples, seqlen) token ids")
    options.add_argument("output")
    options.add_argument("--threads", type=int, default=None)
    args = options.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = load_file(args.tokens)["tokens"]
    mask = torch.ones_like(tokens)
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": mask.tolist()})
    weights = {
        "num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64,
        "actorder": "static",
    }  # fmt: skip
    groups = {"linears": {"targets": ["Linear"], "weights": weights}}
    oneshot(
        model=model, tokenizer=tokenizer, dataset=data, shuffle_calibration_samples=False,
        num_calibration_samples=tokens.shape[0], max_seq_length=tokens.shape[1],
        recipe=GPTQModifier(ignore=["lm_head"], config_groups=groups),
    )  # fmt: skip
    model.save_pretrained(args.output, save_compressed=True)
    print(json.dumps({"seconds": time.perf_counter() - start}))


if __name__ == "__main__":
    main()
