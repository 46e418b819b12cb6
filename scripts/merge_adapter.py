"""Make one checkpoint of a plain model and an adapter that gives it a memory, for `msa-hf encode` and `msa-hf ask`.

    python scripts/merge_adapter.py --base build/real/base --adapter model_cards/msa-hf-smollm2-135m --out build/model

The adapter's directory holds, beside what PEFT saved, `memory.json` (the fields of the memory, as `msa-hf train` writes
them); its protocol and `fusion.json` come along where it has them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer

from msa_hf import MSAConfig, MSAForCausalLM
from msa_hf.generation import PromptProtocol
from msa_hf.generation.protocol import PROTOCOL_FILE
from msa_hf.retrieval import FusionWeights
from msa_hf.training.adapter_memory import ADAPTER_MEMORY


def merge(base: str, adapter: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the checkpoint, its tokenizer, its protocol and its fusion weights to `out`."""
    if not (adapter / ADAPTER_MEMORY).is_file():
        raise SystemExit(
            f"{adapter} has no {ADAPTER_MEMORY}: write the fields that the model was made with into it, for example "
            '{"memory_layers": [14, 19, 24], "query_reduction": "last"}.'
        )
    fields = json.loads((adapter / ADAPTER_MEMORY).read_text(encoding="utf-8"))
    fields = {"routers_trained": True, **fields}  # by whoever saved the adapter
    retrofit = isinstance(AutoConfig.from_pretrained(base), MSAConfig)
    make = MSAForCausalLM.from_pretrained if retrofit else MSAForCausalLM.from_base
    model = make(base, dtype=torch.float32, **fields)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.to(dtype).save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    if (adapter / PROTOCOL_FILE).is_file():
        PromptProtocol.from_pretrained(adapter).save_pretrained(out)
    with contextlib.suppress(FileNotFoundError):
        FusionWeights.from_pretrained(adapter).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a directory or a Hub id")
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    merge(arguments.base, arguments.adapter, arguments.out)


if __name__ == "__main__":
    main()
