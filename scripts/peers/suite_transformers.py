"""transformers' own suites over tiny models: plain, ours without a memory, and ours with one bound.

Run by scripts/peer_suites.sh, which puts the `tests` of transformers' source distribution on the path.
"""

import unittest
from typing import Any

import families
import placeholders
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

placeholders.fill_in()

import torch  # noqa: E402
from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin, ids_tensor  # noqa: E402
from tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

# The mixins look up by a class's name whether it takes labels; ours are known once they are made.
MODEL_MAPPING_NAMES.setdefault("msa", "MSAModel")
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("msa", "MSAForCausalLM")


class SuiteInputs:
    """A configuration and inputs, as the mixins ask for."""

    batch_size, seq_length, is_training = 13, 7, True
    hidden_size, num_hidden_layers, num_attention_heads = (
        families.COMMON[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    vocab_size = families.COMMON["vocab_size"]

    def __init__(self, parent: Any) -> None:
        self.base_model_class, self.causal_lm_class = parent.classes()
        self.make_config = parent.make_config
        self.config_class = type(self.get_config())

    def get_config(self) -> Any:
        return self.make_config()

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


class Suite(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    """A family in one form; the concrete classes below say which."""

    family = form = ""
    model_tester: Any = None
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        self.model_tester = SuiteInputs(self)
        self.all_model_classes = self.classes()

    def test_config(self) -> None:
        made_of = families.arguments(self.family, self.form)
        ConfigTester(self, config_class=self.model_tester.config_class, **made_of).run_common_tests()

    def classes(self) -> tuple[type, type]:
        """Headless model and causal LM."""
        return families.classes(self.family, self.form)

    def make_config(self) -> Any:
        return families.config(self.family, self.form)


for family in families.FAMILIES:
    for form in families.FORMS:
        name = f"Test{family}_{form}"
        fields = {"family": family, "form": form, "__module__": __name__}
        globals()[name] = type(name, (Suite, unittest.TestCase), fields)
del Suite
