"""The backward of `pool_chunks` in Triton; it stands beside the forward."""

from .triton_pool_chunks import pool_chunks_backward

__all__ = ["pool_chunks_backward"]
