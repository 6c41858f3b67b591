"""Driver of llm-compressor: GPTQ or SparseGPT on given tokens; see common.py.

settings: "sparsity" and what else its SparseGPTModifier takes, or the options of a weight's quantization, or
"scheme", a name of its own for them.
"""

import torch
from common import Clock, finish, linear_names, load_dense, load_tokens, read_job, stored_bytes
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig


def main() -> None:
    job = read_job()
    clock = Clock()
    model = load_dense(job.dense)
    names = linear_names(model)
    tokens = load_tokens(job)
    mask = torch.ones_like(tokens)
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": mask.tolist()})
    oneshot(
        model=model, tokenizer=AutoTokenizer.from_pretrained(job.dense), dataset=data,
        shuffle_calibration_samples=False, num_calibration_samples=tokens.shape[0],
        max_seq_length=tokens.shape[1], recipe=modifier(job.settings),
    )  # fmt: skip
    model.save_pretrained(job.saved, save_compressed=True)
    measured = clock.stop()
    del model
    # A pruned model is a plain one.
    plain = (
        {}
        if "sparsity" in job.settings
        else {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
    )
    found = AutoModelForCausalLM.from_pretrained(job.saved, dtype=torch.bfloat16, **plain)
    weights = ((name, found.get_submodule(name).weight) for name in names)
    finish(job, measured, weights, stored_bytes(job.saved, names, job.dense))


def modifier(settings):
    if "sparsity" in settings:
        return SparseGPTModifier(targets=["Linear"], ignore=["re:.*lm_head"], **settings)
    if "scheme" in settings:
        return GPTQModifier(targets="Linear", ignore=["lm_head"], **settings)
    weights = {"type": "int", "strategy": "group", "actorder": "static", **settings}
    return GPTQModifier(
        ignore=["lm_head"], config_groups={"linears": {"targets": ["Linear"], "weights": weights}}
    )


if __name__ == "__main__":
    main()
