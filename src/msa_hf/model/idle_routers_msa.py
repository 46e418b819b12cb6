"""Training steps that leave the routers as they are, said once: whoever trains a memory wants them to learn."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .retrofit_msa import ROUTER_MODULES

logger = logging.get_logger(__name__)

IDLE = "The routers get no gradient"
NO_DOCUMENTS = (
    f"{IDLE}: this training step has no `documents`, so the model trains as one without a memory. Give its batches "
    "`documents` and `positive_docs`, as msa_hf.training.QuestionCollator makes them of questions (data_collator=..., "
    "remove_unused_columns=False), or train by `msa-hf train`."
)
NO_POSITIVES = (
    f"{IDLE}: this training step has documents but no `positive_docs`, which say what routers should choose. Give its "
    "batches `positive_docs`, as msa_hf.training.QuestionCollator does, or train by `msa-hf train`."
)
FROZEN = (
    f"{IDLE}: their parameters are frozen, as PEFT freezes all that it is not told to train. Make the adapter's "
    "configuration by msa_hf.training.peft_config(model), which trains the routers whole."
)
REPLACED = (
    f"{IDLE}: {{}} has put a forward of its own in the place of the model's, as trl's trainers do, and that one takes "
    "no `documents`, so the model trains as one without a memory. Train it by transformers.Trainer or "
    "msa_hf.training.MemoryTrainer on batches of msa_hf.training.QuestionCollator, or by `msa-hf train`."
)


def warn_of_replaced_forward(model: PreTrainedModel) -> None:
    """Say once per model where training calls another forward than the model's own, which says nothing then.

    Wrappers, such as those of mixed precision, name what they wrap and are looked through.
    """
    given = vars(model).get("forward")
    said: set[str] = vars(model).setdefault("_said_of_routers", set())
    if given is None or REPLACED in said or model.config.shared_router:
        return
    while given is not None:
        function = getattr(given, "__func__", given)
        home = getattr(function, "__globals__", {}).get("__name__", "something")
        inner = getattr(given, "__wrapped__", None)
        # trl's calls itself a wrapper, and calls what it wraps only where it is told to.
        if home.startswith("trl.") or (inner is None and function is not type(model).forward):
            said.add(REPLACED)
            logger.warning(REPLACED.format(home))
            return
        given = inner


def warn_of_idle_routers(model: PreTrainedModel, documents: bool, positives: bool) -> None:
    """Say once per model where a step of training gives its routers no gradient, and what helps.

    Args:
        documents: the step has documents.
        positives: it says which of them are right.
    """
    if not model.training or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    said: set[str] = vars(model).setdefault("_said_of_routers", set())
    problem = "" if documents and positives else NO_POSITIVES if documents else NO_DOCUMENTS
    if (problem or "checked") in said or model.config.shared_router:
        return
    said.add(problem or "checked")
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    frozen = not any(router in name for name in trained for router in ROUTER_MODULES)
    if trained and (problem or frozen):
        logger.warning(problem if not frozen else FROZEN if not problem else f"{problem} {FROZEN}")
