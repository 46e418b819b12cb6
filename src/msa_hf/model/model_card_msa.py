"""The card of a checkpoint: what it was made of, what its memory is, and how it is loaded."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError

from .cards_msa import CARD, MOST_BYTES, TAG, metadata_of, signed, table
from .configuration_msa import MSAConfig
from .hub_cache_msa import is_snapshot

SECONDS = 5.0  # for the card of a base that is on the Hub
PAPER = "https://arxiv.org/abs/2603.23516"
TRAINED = {
    True: "yes",
    False: "no: what they choose is little better than chance until `msa-hf train` has trained them",
    None: "not known",
}


@dataclass(frozen=True)
class BaseFacts:
    """The plain model that a checkpoint was made of, as far as it is known.

    Attributes:
        name: on the Hub; None where it is not known, or lies on one machine alone.
        license: as its card says.
    """

    name: str | None = None
    license: str | None = None


def base_facts(config: MSAConfig, ask_hub: bool = False) -> BaseFacts:
    """The card's words on the weights that a model was loaded from: of its base, or of a checkpoint of ours.

    Args:
        ask_hub: also for a card that is on the Hub and not in its cache. What it does not say at once is not known.
    """
    source = str(config.name_or_path or "")
    if not source:
        return BaseFacts()
    if (local := Path(source)).is_dir():
        name = _name_of_snapshot(local)
        said, kind = metadata_of(local / CARD), _model_type(local / "config.json")
    else:
        configuration = _cached(source, "config.json")
        if configuration is None:  # no name on the Hub that anything was loaded from
            return BaseFacts()
        card = _cached(source, CARD) or _fetched(source, ask_hub)
        name = source
        said, kind = metadata_of(card) if card is not None else {}, _model_type(configuration)
    if kind == MSAConfig.model_type:
        name = _text(said.get("base_model")) or name
    return BaseFacts(name, _text(said.get("license")))


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _name_of_snapshot(directory: Path) -> str | None:
    """The name of the repository that a directory is a snapshot of."""
    if not is_snapshot(directory):
        return None
    kind, *parts = Path(os.path.realpath(directory)).parent.parent.name.split("--")
    return "/".join(parts) if kind == "models" else None


def _cached(name: str, file: str) -> Path | None:
    with suppress(HFValidationError, OSError, ValueError):
        found = try_to_load_from_cache(name, file)
        return Path(found) if isinstance(found, str) else None
    return None


def _fetched(name: str, ask_hub: bool) -> Path | None:
    if ask_hub:
        with suppress(HTTPError, OSError, ValueError):
            return Path(hf_hub_download(name, CARD, etag_timeout=SECONDS))
    return None


def _model_type(configuration: Path) -> str | None:
    with suppress(OSError, ValueError):
        if configuration.stat().st_size <= MOST_BYTES:
            read = json.loads(configuration.read_text(encoding="utf-8"))
            return _text(read.get("model_type")) if isinstance(read, dict) else None
    return None


def model_card(
    config: MSAConfig, base: BaseFacts, name: str | None = None, tags: list[str] | None = None, headless: bool = False
) -> str:
    """The text of a card.

    Args:
        base: what the model was made of.
        name: of the checkpoint on the Hub, None where it is saved to a directory.
        tags: further ones.
        headless: it is an `MSAModel`.
    """
    kind = config.base_model_type
    data = ModelCardData(
        base_model=base.name,
        library_name="transformers",
        license=base.license,
        pipeline_tag=None if headless else "text-generation",
        tags=[TAG, "memory", "memory-sparse-attention", str(kind), *(tags or [])],
    )
    routers = "none: layers route by their own queries and keys" if config.shared_router else None
    rows = {
        "base": f"[{base.name}](https://huggingface.co/{base.name})" if base.name else "not named",
        "kind of the base": f"`{kind}`",
        "memory layers": ", ".join(map(str, config.memory_layers)),
        "chunk size": f"{config.chunk_size} tokens",
        "documents per memory layer": config.top_k,
        "similarity": f"`{config.similarity}`",
        "routers trained": routers or TRAINED[config.routers_trained],
    }
    where = name or "path/of/this/directory"
    head = "AutoModel" if headless else "AutoModelForCausalLM"
    ours = "MSAModel" if headless else "MSAForCausalLM"
    stated = "" if base.license else "\nThe license of the base is not known here: put it into the metadata above.\n"
    text = f"""---
{data.to_yaml()}
---

# {name.rpartition("/")[2] if name else f"A {kind} model with a memory"}

A language model with a memory of documents ([Memory Sparse Attention]({PAPER})). Every document goes through it once;
from then on `generate(memory=bank)` attends to the few that a question needs. Without a memory it computes what its
base computes.

{table(rows)}

## Use

With the package `{TAG}`:

```python
from transformers import AutoTokenizer
from {TAG} import {ours}

model = {ours}.from_pretrained("{where}")
tokenizer = AutoTokenizer.from_pretrained("{where}")
bank = model.encode_documents(["The tower was built in 1889."], tokenizer)
inputs = tokenizer("When was the tower built?", return_tensors="pt")
model{"" if headless else ".generate"}(**inputs, memory=bank)
```

Without it, by the code that is here: `{head}.from_pretrained("{where}", trust_remote_code=True)`.
{stated}"""
    return signed(ModelCard(text))
