"""Native operations: routing, pooling and gathering, on the best backend that the machine has (`dispatch`)."""

from ..moved import renamed
from . import adapters
from .dispatch import BACKENDS, BackendError, use_backend
from .gather_documents import gather_documents
from .pool_chunks import pool_chunks
from .quantize import quantize_keys, recall_of_candidates
from .rescore_documents import rescore_documents
from .route_documents import route_documents

adapters.register()

__all__ = [
    "BACKENDS",
    "BackendError",
    "gather_documents",
    "pool_chunks",
    "quantize_keys",
    "recall_of_candidates",
    "rescore_documents",
    "route_documents",
    "use_backend",
]

__getattr__ = renamed(__name__, {"quantise_keys": "quantize_keys"})
