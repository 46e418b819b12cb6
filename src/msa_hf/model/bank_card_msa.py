"""The card of a bank on the Hub: what it holds, and which model reads it."""

from dataclasses import dataclass

import torch
from huggingface_hub import DatasetCard, DatasetCardData

from .bank_format_msa import Manifest
from .cards_msa import TAG, signed, table
from .origin_msa import BankOrigin

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
UNKNOWN_LICENSE = "unknown"


@dataclass(frozen=True)
class BankFacts:
    """The facts that a card states of a bank.

    Attributes:
        manifest: as it was saved.
        origin: what the bank was made with.
        texts: documents whose text is in the bank.
        dtype: of its tensors.
    """

    manifest: Manifest
    origin: BankOrigin
    texts: int
    dtype: torch.dtype


def bank_card(repo_id: str, facts: BankFacts, model_id: str | None, license: str | None) -> str:
    """The text of a card.

    Args:
        repo_id: of the bank.
        model_id: the name of the model that reads it, where known.
        license: of the documents, as the Hub writes it; None: to be filled in.
    """
    counts, origin = facts.manifest["counts"], facts.origin
    documents = counts["documents"]
    data = DatasetCardData(
        license=license or UNKNOWN_LICENSE,
        tags=[TAG, "memory-bank", origin.base_model_type],
        pretty_name=repo_id.rpartition("/")[2],
        size_categories=next((name for limit, name in SIZES if documents < limit), "n>1M"),
        viewer=False,  # its tables are no rows to train on
    )
    named = f"[{model_id}](https://huggingface.co/{model_id})" if model_id else "not named"
    rows = {
        "documents": f"{documents:,}",
        "of these with their text": f"{facts.texts:,}",
        "tokens": f"{counts['tokens']:,}",
        "chunks": f"{counts['chunks']:,} of {origin.chunk_size} tokens",
        "model": f"{named}; fingerprint `{origin.model_fingerprint}`",
        "base of the model": f"`{origin.base_model_type}`",
        "memory layers": ", ".join(map(str, origin.memory_layers)),
        "numbers": str(facts.dtype).removeprefix("torch."),
        "format version": facts.manifest["format_version"],
    }
    stated = (
        f"The documents are under `{license}`."
        if license
        else f"Not stated. Put that of the documents in the place of `license: {UNKNOWN_LICENSE}` above."
    )
    text = f"""---
{data.to_yaml()}
---

# {repo_id.rpartition("/")[2]}

A memory bank: {documents:,} documents that a model with a memory
([Memory Sparse Attention](https://arxiv.org/abs/2603.23516), `{TAG}`) has encoded once, so that
`generate(memory=bank)` attends to the few that a question needs. It belongs to the weights that made it; any
other model refuses it and says what differs.

{table(rows)}

## Use

```python
from transformers import AutoTokenizer
from {TAG} import MSAForCausalLM

model = MSAForCausalLM.from_pretrained("{model_id or "the model that made it"}")
tokenizer = AutoTokenizer.from_pretrained("{model_id or "the model that made it"}")
bank = model.load_memory("{repo_id}", tokenizer)
```

What the documents say, where it was kept, and their metadata are in these files as plain text.

## License

{stated}
"""
    return signed(DatasetCard(text))
