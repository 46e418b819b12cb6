"""A pytest plugin that takes deprecated names of arguments and outputs out of transformers, as a later release will.

Loaded before the models are imported: `pytest -p without_old_names`.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import transformers.utils.deprecation as deprecation
import transformers.utils.generic as generic
from transformers.utils import ModelOutput

OLD_NAMES = ("past_key_values", "cache_params")


def refuse_old_names(old_name: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """In the place of `deprecate_kwarg`: the old name is no argument any more."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def refuse(*given: Any, **named: Any) -> Any:
            if old_name in OLD_NAMES and old_name in named:
                raise TypeError(f"{function.__qualname__}() got an unexpected keyword argument {old_name!r}")
            return function(*given, **named)

        return refuse

    return decorate


if hasattr(ModelOutput, "past_key_values"):  # the release that renamed it, and those that take both names
    deprecation.deprecate_kwarg = refuse_old_names
    for name in OLD_NAMES:
        delattr(ModelOutput, name)
    ModelOutput._replace_old_cache_name = lambda self, key: key
    generic._rename_kwargs_for_bc = lambda kwargs: kwargs
