"""A memory of 100 million tokens for any Hugging Face causal LM (Memory Sparse Attention, arXiv 2603.23516)."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from . import moved as moved  # modules by their old names, for one release
from . import ops as ops  # the model uses them from here on
from .model.cache_msa import MSACache
from .model.configuration_msa import MSAConfig
from .model.memory_msa import Document, MemoryBank
from .model.modeling_msa import MSAForCausalLM, MSAModel
from .model.routing_msa import LayerRouting

__version__ = "0.1.0"

AutoConfig.register(MSAConfig.model_type, MSAConfig)
AutoModel.register(MSAConfig, MSAModel)
AutoModelForCausalLM.register(MSAConfig, MSAForCausalLM)
# A tokenizer keeps its own class in tokenizer_config.json; this one reads those that name none.
AutoTokenizer.register(MSAConfig, PreTrainedTokenizerFast)

__all__ = [
    "Document",
    "LayerRouting",
    "MSACache",
    "MSAConfig",
    "MSAForCausalLM",
    "MSAModel",
    "MemoryBank",
]
