"""lrsd: post-training compression of transformers into low rank + structured sparse weights.

`import lrsd` registers the checkpoint loader, so that `AutoModelForCausalLM.from_pretrained`
reads what `lrsd compress` wrote.
"""

from lrsd.runtimes import transformers as _hf  # noqa: F401 - imported for its registration
