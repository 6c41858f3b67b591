"""Kinds of models: how each is recognized, and what it is calibrated and evaluated on."""

from lrsd.model.kinds.base import Kind
from lrsd.model.kinds.causal import Causal
from lrsd.model.kinds.encoder import Encoder
from lrsd.model.kinds.masked import Masked
from lrsd.model.kinds.seq2seq import Seq2Seq
from lrsd.model.kinds.speech import Speech
from lrsd.model.types import Model

# In the order of detection; the last one takes whatever is left.
KINDS: tuple[Kind, ...] = (Speech(), Seq2Seq(), Causal(), Masked(), Encoder())


def kind_of(model: Model) -> Kind:
    """The first kind that recognizes the model."""
    return next(kind for kind in KINDS if kind.recognizes(model))
