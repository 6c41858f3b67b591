"""Methods of compression, by the name that `--method` knows them by."""

from lrsd.methods.base import Method
from lrsd.methods.columns import Columns
from lrsd.methods.gguf import Gguf
from lrsd.methods.gptq import Gptq
from lrsd.methods.integers import Integers
from lrsd.methods.losparse import Losparse
from lrsd.methods.lrsd import Lrsd
from lrsd.methods.sparsegpt import SparseGpt
from lrsd.methods.ssd import Ssd
from lrsd.methods.svd import Asvd, Svd, SvdLlm
from lrsd.methods.wanda import Wanda

METHODS: dict[str, type[Method]] = {
    "lrsd": Lrsd,
    "integers": Integers,
    "gguf": Gguf,
    "gptq": Gptq,
    "sparsegpt": SparseGpt,
    "wanda": Wanda,
    "ssd": Ssd,
    "svd-llm": SvdLlm,
    "asvd": Asvd,
    "svd": Svd,
    "columns": Columns,
    "losparse": Losparse,
}
