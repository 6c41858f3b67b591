"""Stored forms of a linear weight, by the name that config.json knows them by."""

from lrsd.forms.base import Form
from lrsd.forms.entropy import Entropy
from lrsd.forms.ggml import Ggml
from lrsd.forms.groupwise import Groupwise
from lrsd.forms.lowrank import LowRank
from lrsd.forms.masked import Masked
from lrsd.forms.symmetric import Symmetric
from lrsd.forms.trellis import Trellis

FORMS: dict[str, type[Form]] = {
    "low_rank": LowRank,
    "masked": Masked,
    "entropy": Entropy,
    "ggml": Ggml,
    "groupwise": Groupwise,
    "symmetric": Symmetric,
    "trellis": Trellis,
}
