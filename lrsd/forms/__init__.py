"""Stored forms of a linear weight, by the name that config.json knows them by."""

from lrsd.forms.base import Form
from lrsd.forms.blocks import Blocks
from lrsd.forms.coded_low_rank import CodedLowRank
from lrsd.forms.entropy import Entropy
from lrsd.forms.ggml import Ggml
from lrsd.forms.groupwise import Groupwise
from lrsd.forms.lowrank import LowRank
from lrsd.forms.masked import Masked
from lrsd.forms.semi_structured import SemiStructured
from lrsd.forms.symmetric import Symmetric
from lrsd.forms.trellis import Trellis

FORMS: dict[str, type[Form]] = {
    "low_rank": LowRank,
    "masked": Masked,
    "blocks": Blocks,
    "semi_structured": SemiStructured,
    "coded_low_rank": CodedLowRank,
    "entropy": Entropy,
    "ggml": Ggml,
    "groupwise": Groupwise,
    "symmetric": Symmetric,
    "trellis": Trellis,
}
