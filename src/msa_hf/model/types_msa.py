"""Types that the code of a model shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

# The keyword arguments of a call that are handed on: whatever a version of transformers takes.
Arguments = dict[str, Any]
# A document as a user has it: a text, token ids, or a row with either.
RawDocument = str | Sequence[int] | Tensor | Mapping[str, object]

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    # What stands in front of a base's own class may use all that this class has.
    ModelMixin = PreTrainedModel
else:
    ModelMixin = object
