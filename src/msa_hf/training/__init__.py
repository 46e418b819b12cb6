"""Tools to train a memory with.

The model's own training forward is not here but in `msa_hf.model` (training_msa.py, packing_msa.py, losses_msa.py),
which travels with every checkpoint, so that it trains where this package is not installed. Nothing in this package is
needed to load or run a model, and it may use the libraries of the extra `train`.
"""

from typing import TYPE_CHECKING

from ..lazy import exports

if TYPE_CHECKING:
    from ..evaluation.diagnosis import diagnose
    from ..evaluation.recall import router_recall
    from ..evaluation.report import Diagnosis
    from ..evaluation.sharpen import sharpen_score_bias
    from .centering import center_routers, sample_rows
    from .collators import QuestionCollator
    from .compiling import compiled_layers
    from .contrastive import Temperatures, TokenRows, contrastive_step
    from .corpus import numbered_rows, train_on_corpus
    from .monitor import CollapsedError, CollapseGuard, RouterMonitor
    from .peft import peft_config
    from .question_generation import sample_questions
    from .teacher import EmbeddingTeacher
    from .trainer import MemoryTrainer, RouterWarmup
    from .weights import TrainedWeights
    from .widening import fit_routers

__all__ = [
    "CollapseGuard",
    "CollapsedError",
    "Diagnosis",
    "EmbeddingTeacher",
    "MemoryTrainer",
    "QuestionCollator",
    "RouterMonitor",
    "RouterWarmup",
    "Temperatures",
    "TokenRows",
    "TrainedWeights",
    "center_routers",
    "compiled_layers",
    "contrastive_step",
    "diagnose",
    "fit_routers",
    "numbered_rows",
    "peft_config",
    "router_recall",
    "sample_questions",
    "sample_rows",
    "sharpen_score_bias",
    "train_on_corpus",
]

__getattr__ = exports(
    __name__,
    {
        "..evaluation.diagnosis": ["diagnose"],
        "..evaluation.recall": ["router_recall"],
        "..evaluation.report": ["Diagnosis"],
        "..evaluation.sharpen": ["sharpen_score_bias"],
        ".centering": ["center_routers", "sample_rows"],
        ".collators": ["QuestionCollator"],
        ".compiling": ["compiled_layers"],
        ".contrastive": ["Temperatures", "TokenRows", "contrastive_step"],
        ".corpus": ["numbered_rows", "train_on_corpus"],
        ".monitor": ["CollapsedError", "CollapseGuard", "RouterMonitor"],
        ".peft": ["peft_config"],
        ".question_generation": ["sample_questions"],
        ".trainer": ["MemoryTrainer", "RouterWarmup"],
        ".teacher": ["EmbeddingTeacher"],
        ".weights": ["TrainedWeights"],
        ".widening": ["fit_routers"],
    },
)
