"""Attributes that were renamed: the old names work for one release, with a DeprecationWarning."""

import warnings


def renamed_attribute(old: str, new: str) -> property:
    """A property that reads the attribute `new` where it is asked for by its name of before."""

    def read(owner: object) -> object:
        warnings.warn(
            f"`{type(owner).__name__}.{old}` is `{new}` now; the old name goes with the next release.",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(owner, new)

    return property(read, doc=f"The name of `{new}` until 0.1.")
