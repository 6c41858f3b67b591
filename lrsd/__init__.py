"""lrsd: post-training compression of transformers into low rank + structured sparse weights.

`import lrsd` registers the checkpoint loader, so that `AutoModelForCausalLM.from_pretrained`
reads what `lrsd compress` wrote. Where lrsd is installed, torch does that by itself, see `lrsd_cli.autoload`.
"""

import sys

# The command line does that itself when a command runs: its help need not wait for transformers.
if "lrsd_cli.main" not in sys.modules:
    from lrsd.runtimes import transformers as _  # noqa: F401 - imported for its registration
