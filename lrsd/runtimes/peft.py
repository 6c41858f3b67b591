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
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from transformers import PreTrainedModel

from lrsd.forms.packed import PackedLinear
from lrsd.model.slots import is_linear

C = TypeVar("C", bound=LoraConfig)


def on_packed(config: C, model: PreTrainedModel | None = None) -> C:
    """The configuration, told how packed layers are adapted. An adapter cannot be merged into one.

    model: needed for target_modules="all-linear", which PEFT itself takes for dense layers only: its packed
    and dense ones but the head. Raises: ValueError if it is missing then.
    """
    config._register_custom_module({PackedLinear: Linear})
    if config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        if model is None:
            raise ValueError('for target_modules="all-linear", give the model too: on_packed(config, model)')
        head = model.get_output_embeddings()
        config.target_modules = [
            name
            for name, module in model.named_modules()
            if module is not head and (isinstance(module, PackedLinear) or is_linear(module))
        ]
    return config
