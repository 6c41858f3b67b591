"""LoRA on packed models: PEFT's own layer around a packed linear instead of a dense one.

    from lrsd.runtimes.peft import on_packed
    model = get_peft_model(model, on_packed(LoraConfig(target_modules=["q_proj", "v_proj"])))

and to read an adapter back, `PeftModel.from_pretrained(model, directory,
config=on_packed(LoraConfig.from_pretrained(directory)))`. What is trained are the adapter's factors only; the
adapter that is saved is an ordinary one, and goes with what `lrsd export` writes, too.
"""

from typing import TypeVar

from peft import LoraConfig
from peft.tuners.lora import Linear

from lrsd.forms.packed import PackedLinear

C = TypeVar("C", bound=LoraConfig)


def on_packed(config: C) -> C:
    """The configuration, told how packed layers are adapted. An adapter cannot be merged into one."""
    config._register_custom_module({PackedLinear: Linear})
    return config
