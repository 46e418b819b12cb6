"""Native operations of the memory, on the best backend that the machine has (`dispatch`)."""

from ..moved import renamed
from . import adapters
from .attend_token import ATTEND_TOKEN, attend_token
from .dispatch import BACKENDS, OPERATIONS, BackendError, use_backend
from .gather_documents import GATHER_DOCUMENTS, gather_documents
from .pool_chunks import POOL_CHUNKS, POOL_CHUNKS_BACKWARD, pool_chunks
from .quantize import quantize_keys, recall_of_candidates
from .rescore_documents import RESCORE_DOCUMENTS, rescore_documents
from .route_documents import ROUTE_DOCUMENTS, route_documents

for _operation in (
    ROUTE_DOCUMENTS,
    RESCORE_DOCUMENTS,
    POOL_CHUNKS,
    POOL_CHUNKS_BACKWARD,
    GATHER_DOCUMENTS,
    ATTEND_TOKEN,
):
    OPERATIONS[_operation.name] = _operation
adapters.register()

__all__ = [
    "BACKENDS",
    "BackendError",
    "attend_token",
    "gather_documents",
    "pool_chunks",
    "quantize_keys",
    "recall_of_candidates",
    "rescore_documents",
    "route_documents",
    "use_backend",
]

__getattr__ = renamed(__name__, {"quantise_keys": "quantize_keys"})
