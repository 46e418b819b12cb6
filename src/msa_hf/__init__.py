"""A memory of 100 million tokens for any Hugging Face causal LM (Memory Sparse Attention, arXiv 2603.23516)."""

from typing import TYPE_CHECKING

from . import moved as moved  # modules by their old names, for one release
from .lazy import exports
from .registration import register_when_needed

if TYPE_CHECKING:
    from . import model as model
    from . import ops as ops
    from .model.cache_msa import MSACache
    from .model.configuration_msa import MSAConfig
    from .model.memory_msa import Document, MemoryBank
    from .model.modeling_msa import MSAForCausalLM, MSAModel
    from .model.routing_msa import LayerRouting

__version__ = "0.1.0"

__all__ = [
    "Document",
    "LayerRouting",
    "MSACache",
    "MSAConfig",
    "MSAForCausalLM",
    "MSAModel",
    "MemoryBank",
]

__getattr__ = exports(
    __name__,
    {
        ".model.cache_msa": ["MSACache"],
        ".model.configuration_msa": ["MSAConfig"],
        ".model.memory_msa": ["Document", "MemoryBank"],
        ".model.modeling_msa": ["MSAForCausalLM", "MSAModel"],
        ".model.routing_msa": ["LayerRouting"],
        ".ops": [],
    },
)

register_when_needed()
