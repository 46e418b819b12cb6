"""One of two processes whose Trainers log together, which fails where the parts logged do not make up the loss."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from setups import setup
from steps import pad
from transformers import TrainingArguments

from msa_hf.training import MemoryTrainer


def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "input_ids": pad([row["input_ids"] for row in batch], 0),
        "labels": pad([row["labels"] for row in batch], -100),
        "documents": [row["documents"] for row in batch],
        "positive_docs": torch.arange(len(batch))[:, None],
    }


def main(directory: Path, port: int, average: bool, rank: int) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    rows = [
        {"input_ids": [9, 10 + n, *answer], "labels": [-100, -100, *answer], "documents": [10 + n, *answer, 5]}
        for n, answer in enumerate([[60] * (1 + n) for n in range(6)])
    ]
    arguments = TrainingArguments(
        str(directory),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        learning_rate=0.0,
        num_train_epochs=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,  # three batches a process: a step of two, and one of one
        logging_steps=1,
        remove_unused_columns=False,
        average_tokens_across_devices=average,
    )
    model = setup(lm_loss_weight=0.7, aux_loss_weight=1.0).model
    trainer = MemoryTrainer(model, arguments, train_dataset=rows, data_collator=collate)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 2
    for row in logged:
        assert 0.7 * row["lm_loss"] + row["aux_loss"] == pytest.approx(row["loss"], rel=1e-5)
    torch.distributed.destroy_process_group()
