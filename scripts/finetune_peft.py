"""Fine-tune a model with a memory on your own documents and questions: LoRA, and the routers whole.

    python scripts/finetune_peft.py --base Qwen/Qwen3-0.6B --documents docs.jsonl --questions questions.jsonl \\
        --output adapter
    accelerate launch scripts/finetune_peft.py ...         # several GPUs

`docs.jsonl` holds one {"key": ..., "text": ...} a line, `questions.jsonl` one {"question": ..., "answer": ...,
"positives": [keys of the documents that answer it]}. docs/finetuning.md says what data and how many steps it takes.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoTokenizer, Trainer, TrainingArguments, set_seed

from msa_hf import MSAConfig, MSAForCausalLM
from msa_hf.training import QuestionCollator, peft_config, router_recall
from msa_hf.training.data import DataError, read_documents, read_questions


class DefaultsThatAreThere(argparse.ArgumentDefaultsHelpFormatter):
    """Names the default of options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def parser() -> argparse.ArgumentParser:
    def count(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
        return int(text)

    def rate(text: str) -> float:
        if not 0 < float(text) < float("inf"):
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return float(text)

    made = argparse.ArgumentParser(
        description="Fine-tune a model with a memory: LoRA, and the routers whole.",
        formatter_class=DefaultsThatAreThere,
    )
    add = made.add_argument
    add("--base", required=True, help="a plain checkpoint, which gets a memory, or one that has a memory")
    add("--documents", required=True, type=Path, help="JSON Lines with key, text")
    add("--questions", required=True, type=Path, help="JSON Lines with question, answer, positives (document keys)")
    add("--output", required=True, type=Path, help="directory of the adapter")
    add("--pool", type=count, default=64, help="documents per step, shared by its questions")
    add("--batch-size", type=count, default=8, help="questions per step and device")
    add("--steps", type=count, default=500)
    add("--learning-rate", type=rate, default=1e-4, help="of the adapters")
    add("--router-learning-rate", type=rate, default=1e-3, help="of the routers")
    add("--rank", type=count, default=16, help="of the adapters")
    add("--max-length", type=count, default=1024, help="longest document, and question with answer, in tokens")
    add("--eval-questions", type=int, help="held out to measure the routers; 0 for none (default: a fifth, up to 100)")
    add("--top-k", type=count, help="documents per memory layer (default: 16, or the checkpoint's)")
    add("--chunk-size", type=count, help="tokens per chunk (default: 64, or the checkpoint's)")
    add("--seed", type=int, default=0)
    add("--bf16", action="store_true", help="compute in bfloat16; weights stay in float32")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    return made


class UserError(Exception):
    """A mistake of the user's: one line, exit code 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        finetune(options)
    except (UserError, DataError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def finetune(options: argparse.Namespace) -> None:
    documents = read_documents(options.documents)
    questions = read_questions(options.questions, documents)
    training, held_out = split(questions, options.eval_questions, options.seed)
    set_seed(options.seed)
    model, tokenizer = load(options)
    try:
        collator = QuestionCollator(tokenizer, documents, options.pool, options.seed, limit(options, model))
        for question in questions:
            collator.row(question)
    except ValueError as error:
        raise UserError(f"{error} (--max-length {options.max_length})") from None
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {options.output}: {error.strerror}") from None

    trainer = make_trainer(options, get_peft_model(model, peft_config(model, r=options.rank)), training, collator)
    if trainer.args.n_gpu > 1:
        raise UserError("several GPUs: start this with `accelerate launch`, or name one in CUDA_VISIBLE_DEVICES")
    speaks = trainer.is_world_process_zero()
    available = min(options.pool, len(documents))
    if speaks and available <= model.config.top_k:
        print(
            f"note: {available} documents a step, of which each layer reads {model.config.top_k}: routers learn little "
            "that way; raise --pool or lower --top-k",
            file=sys.stderr,
        )
    results = {}
    if held_out:
        results["before"] = measure(trainer.model, tokenizer, documents, held_out)
    trainer.train()
    if held_out:
        results["after"] = measure(trainer.model, tokenizer, documents, held_out)
    trainer.save_model(str(options.output))
    if speaks:
        tokenizer.save_pretrained(options.output)
        if results:
            print(table(results, len(documents)))
        print(f"adapter saved to {options.output}; load it with\n  {loading(options, model)}")


def split(questions: list[Any], count: int | None, seed: int) -> tuple[list[Any], list[Any]]:
    """Questions to train on, and those held out; only questions with positives say something about routers."""
    places = [place for place, question in enumerate(questions) if question["positives"]]
    if count is None:
        count = min(100, len(places) // 5)
    if count < 0:
        raise UserError(f"--eval-questions must be at least 0, got {count}")
    if count > len(places) // 2:
        raise UserError(
            f"--eval-questions {count}: of {len(places)} questions with positives at most {len(places) // 2} can be "
            "held out"
        )
    held_out = set(random.Random(seed).sample(places, count))
    kept = [question for place, question in enumerate(questions) if place not in held_out]
    return kept, [questions[place] for place in sorted(held_out)]


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model, given a memory where it has none, and its tokenizer."""
    chosen = {name: getattr(options, name) for name in ("top_k", "chunk_size") if getattr(options, name) is not None}
    try:
        make = MSAForCausalLM.from_pretrained if is_retrofit(options.base) else MSAForCausalLM.from_base
        model = make(options.base, dtype=torch.float32, **chosen)
        tokenizer = AutoTokenizer.from_pretrained(options.base)
    except (OSError, ValueError) as error:
        raise UserError(f"--base {options.base}: {error}") from None
    return model, tokenizer


def loading(options: argparse.Namespace, model: Any) -> str:
    """The expression that brings the trained model back."""
    if is_retrofit(options.base):
        base = f"MSAForCausalLM.from_pretrained({options.base!r}"
    else:
        base = f"MSAForCausalLM.from_base({options.base!r}"
    fields = f"top_k={model.config.top_k}, chunk_size={model.config.chunk_size}"
    return f"PeftModel.from_pretrained({base}, {fields}), {str(options.output)!r})"


def is_retrofit(base: str) -> bool:
    return isinstance(AutoConfig.from_pretrained(base), MSAConfig)


def limit(options: argparse.Namespace, model: Any) -> int:
    """Tokens that a document or a row may have; rows start at the model's `first_position`."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return options.max_length if positions is None else min(options.max_length, positions - model.config.first_position)


def make_trainer(options: argparse.Namespace, model: Any, questions: list[Any], collator: QuestionCollator) -> Trainer:
    """A Trainer whose optimizer gives the routers a learning rate of their own."""
    routers = [weight for name, weight in model.named_parameters() if weight.requires_grad and "router_" in name]
    adapters = [weight for name, weight in model.named_parameters() if weight.requires_grad and "router_" not in name]
    groups = [
        {"params": adapters, "lr": options.learning_rate},
        {"params": routers, "lr": options.router_learning_rate},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    names = {field.name for field in fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    arguments = TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 20,
        logging_steps=max(1, options.steps // 20),
        save_strategy="no",
        report_to="none",
        seed=options.seed,
        bf16=options.bf16,
        use_cpu=not torch.accelerator.is_available(),  # said aloud, or bf16 and several processes do not work there
        remove_unused_columns=False,  # the collator reads what the model's forward does not take
        label_names=["labels"],
        **{checkpointing: options.gradient_checkpointing},
    )
    return Trainer(model, arguments, data_collator=collator, train_dataset=questions, optimizers=(optimizer, None))


def measure(model: Any, tokenizer: Any, documents: dict[str, str], questions: list[Any]) -> dict[str, Any]:
    """Router recall on a bank of all documents."""
    rows = ({"key": key, "text": text} for key, text in documents.items())
    bank = model.encode_documents(rows, tokenizer, show_progress=False)
    return router_recall(model, tokenizer, bank, questions)


def table(results: dict[str, dict[str, Any]], documents: int) -> str:
    """Recall before and after, by layer."""
    before, after = results["before"], results["after"]
    lines = [
        f"router recall@{after['k']}: {after['questions']} held-out questions, bank of {documents} documents",
        f"{'layer':>9} {'before':>8} {'after':>8} {'distinct documents':>20}",
    ]
    for layer, recall in after["layers"].items():
        distinct = f"{before['distinct'][layer]} -> {after['distinct'][layer]}"
        lines.append(f"{layer:>9} {before['layers'][layer]:>8.3f} {recall:>8.3f} {distinct:>20}")
    lines.append(f"{'any layer':>9} {before['recall']:>8.3f} {after['recall']:>8.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
