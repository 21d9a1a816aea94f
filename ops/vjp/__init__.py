"""Reverse-mode rules: for each operator, the nodes that carry gradients from its outputs to its inputs. One file per operator family."""

from __future__ import annotations

from .activations import RULES as _ACTIVATIONS
from .arithmetic import RULES as _ARITHMETIC
from .attention import RULES as _ATTENTION
from .base import MIN_OPSET, Call, Gradients, Names, Rule, Rules, Tape, Unsupported, Value
from .conv import RULES as _CONV
from .einsum import RULES as _EINSUM
from .elementwise import RULES as _ELEMENTWISE
from .indexing import RULES as _INDEXING
from .layout import RULES as _LAYOUT
from .matmul import RULES as _MATMUL
from .normalization import RULES as _NORMALIZATION
from .pool import RULES as _POOL
from .quantization import RULES as _QUANTIZATION
from .recurrent import RULES as _RECURRENT
from .reduction import RULES as _REDUCTION
from .resize import RULES as _RESIZE
from .selection import RULES as _SELECTION
from .slicing import RULES as _SLICING
from .softmax import RULES as _SOFTMAX

RULES: Rules = {
    **_ACTIVATIONS,
    **_ARITHMETIC,
    **_ATTENTION,
    **_CONV,
    **_EINSUM,
    **_ELEMENTWISE,
    **_INDEXING,
    **_LAYOUT,
    **_MATMUL,
    **_NORMALIZATION,
    **_POOL,
    **_QUANTIZATION,
    **_RECURRENT,
    **_REDUCTION,
    **_RESIZE,
    **_SELECTION,
    **_SLICING,
    **_SOFTMAX,
}
"""Every rule by operator type; "domain::type" outside the default domain."""

__all__ = ["MIN_OPSET", "RULES", "Call", "Gradients", "Names", "Rule", "Rules", "Tape", "Unsupported", "Value"]
