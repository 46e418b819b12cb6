"""Products of the single row of a generated token with the matrices of a layer, for compiled models on a GPU."""

from .graphs import InductorWithRowProducts, replace_products

__all__ = ["InductorWithRowProducts", "replace_products"]
