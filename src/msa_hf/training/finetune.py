"""Training a model with a memory on a user's documents and questions, from a checkpoint to one.

`prepare` reads and checks everything, `make_trainer` makes a `transformers.Trainer` of it, `train` runs and saves; both
command lines, `msa-hf train` and `scripts/finetune_peft.py`, are these three.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_tensorboard_available, is_wandb_available

from ..data.questions import Question
from ..generation import PromptProtocol, protocol_beside
from ..model.attention_msa import NotFiniteError
from ..model.configuration_msa import MSAConfig
from ..model.hub_msa import BankUnavailable
from ..model.modeling_msa import MSAForCausalLM
from ..model.positions_msa import position_limit
from .adapter_memory import save_adapter_memory
from .collators import QuestionCollator, TranscriptCollator
from .curve import Curve, summary
from .monitor import CollapsedError, CollapseGuard, Measurement, RouterMonitor
from .peft import peft_config
from .resume import SETTINGS_FILE, ResumeDrawing, checkpoint_to_resume, checkpoints_in, digest_of
from .router_time import Work, describe_time, seconds_per_token
from .settings import LORA, SettingError, Settings, TrainingError
from .trainer import MemoryTrainer, RouterWarmup

CURVE_FILE = "training_curve.jsonl"
MOST_HELD_OUT = 100


@dataclass
class Prepared:
    """A run that can begin.

    Attributes:
        settings: what was asked for.
        model: with a memory, and with adapters where they are to be trained.
        tokenizer: of the model.
        documents: key -> text.
        training: questions to train on.
        held_out: questions to measure the routers with.
        collator: makes batches of questions.
        protocol: whose transcripts they are; None: question and answer.
        record: what must be the same for a run to go on after an interruption.
        checkpoint: where an interrupted run goes on.
        notes: what the user should know beforehand.
    """

    settings: Settings
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    documents: Mapping[str, str]
    training: list[Question]
    held_out: list[Question]
    collator: QuestionCollator | TranscriptCollator
    protocol: PromptProtocol | None
    record: dict[str, object]
    checkpoint: Path | None
    notes: list[str]


@dataclass
class Result:
    """The result of a run.

    Attributes:
        measurements: of the routers, as `RouterMonitor` keeps them: the first before the first step, the last after
            the last one; empty where no questions were held out.
        summary: a table, in words.
        load_expression: what that brings the result back.
        output: directory of the result.
        is_main_process: whether this process is the one that prints.
    """

    measurements: list[Measurement]
    summary: str
    load_expression: str
    output: Path
    is_main_process: bool

    def __str__(self) -> str:
        return f"{self.summary}\nsaved to {self.output}; load it with\n  {self.load_expression}"


# Before the run -------------------------------------------------------------------------------------------------------


def prepare(
    settings: Settings,
    documents: Mapping[str, str],
    questions: Sequence[Question],
    protocol: PromptProtocol | None = None,
    chat_template: bool = True,
) -> Prepared:
    """Load the model and check the data, before anything is computed or written.

    Args:
        settings: of the run.
        documents: key -> text; all of them, they are also the bank on which the routers are measured.
        questions: with `question`, `answer` and `positives`, as `read_questions` gives them.
        protocol: whose transcripts are trained, and which is saved with the result; None: question and answer, by the
            tokenizer's chat template if it has one.
        chat_template: False: a chat template is not used, and the result gets none.

    Raises:
        TrainingError: for a mistake of the user's, `SettingError` where a setting is at fault.
    """
    _require_libraries(settings)
    for what, given in (("documents", documents), ("questions", questions)):
        if not given:
            raise TrainingError(f"there are no {what} to train on")
    if not any(question["positives"] for question in questions):
        raise TrainingError(
            f"none of the {len(questions)} questions names a document that answers it ('positives' is empty in all), "
            "so that routers would learn nothing; name the documents, or train by documents alone"
        )
    training, held_out = split(questions, settings.held_out, settings.seed)
    set_seed(settings.seed)
    _check_output(settings)
    model, tokenizer = load(settings)
    if not chat_template:
        tokenizer.chat_template = None
    if protocol is not None:
        try:
            protocol.check_tokenizer(tokenizer)
        except ValueError as error:
            raise SettingError("base", "{} {}: {}", settings.base, error) from None
    record = {
        **settings.decisive(),
        "protocol": None if protocol is None else protocol.to_dict(),
        "chat_template": tokenizer.chat_template if protocol is None else None,
        "data": digest_of(documents, questions),
    }
    checkpoint = checkpoint_to_resume(settings, record)
    try:
        pool, seed, limit = settings.pool, settings.seed, _limit(settings, model)
        collator: QuestionCollator | TranscriptCollator
        if protocol is None:
            collator = QuestionCollator(tokenizer, documents, pool, seed, limit)
        else:
            collator = TranscriptCollator(tokenizer, documents, protocol, pool, seed, limit)
        rows = [len(collator.row(question)[0]) for question in questions]
    except ValueError as error:
        raise SettingError(
            "max_length", "{1} ({0} {2}{3})", error, settings.max_length, _room(settings, model)
        ) from None
    try:
        Path(settings.output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError("output", "{} {}: {}", settings.output, error.strerror) from None
    notes = []
    available = min(settings.pool, len(documents))
    if available <= model.config.top_k:
        notes.append(
            f"{available} documents a step, of which each layer reads {model.config.top_k}: routers learn little that "
            "way; raise --pool or lower --top-k"
        )
    if not torch.accelerator.is_available():
        begun = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
        if line := _time_on_cpu(settings, model, collator, rows, held_out, begun):
            notes.append(line)
    if settings.method == LORA:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config(model, r=settings.rank))
    return Prepared(
        settings, model, tokenizer, documents, training, held_out, collator, protocol, record, checkpoint, notes
    )


def _require_libraries(settings: Settings) -> None:
    try:
        import accelerate  # noqa: F401

        if settings.method == LORA:
            import peft  # noqa: F401
    except ImportError as error:
        raise TrainingError(f"training needs {error.name}: pip install msa-hf[train]") from error
    if settings.report_to != "none" and not reporter_available(settings.report_to):
        raise SettingError("report_to", "{} {}: not installed; pip install {1}", settings.report_to)


def reporter_available(name: str) -> bool:
    """Tell whether what `report_to` names is installed."""
    return bool({"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}[name]())


def split(questions: Sequence[Question], count: int | None, seed: int) -> tuple[list[Question], list[Question]]:
    """Questions to train on, and those held out; only questions with positives say something about routers."""
    places = [place for place, question in enumerate(questions) if question["positives"]]
    if count is None:
        count = min(MOST_HELD_OUT, len(places) // 5)
    if count > len(places) // 2:
        raise SettingError(
            "held_out",
            "{} {}: of {} questions with positives at most {} can be held out",
            count,
            len(places),
            len(places) // 2,
        )
    held_out = set(random.Random(seed).sample(places, count))
    kept = [question for place, question in enumerate(questions) if place not in held_out]
    return kept, [questions[place] for place in sorted(held_out)]


def load(settings: Settings) -> tuple[MSAForCausalLM, PreTrainedTokenizerBase]:
    """The model, given a memory where it has none, and its tokenizer."""
    given = {"top_k": settings.top_k, "chunk_size": settings.chunk_size}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        make = MSAForCausalLM.from_pretrained if _is_retrofit(settings.base) else MSAForCausalLM.from_base
        model = make(settings.base, dtype=torch.float32, **chosen)
        tokenizer = AutoTokenizer.from_pretrained(settings.base)
    except (OSError, ValueError, SafetensorError) as error:
        raise SettingError("base", "{} {}: {}", settings.base, error) from None
    return model, tokenizer


def _is_retrofit(base: str) -> bool:
    return isinstance(AutoConfig.from_pretrained(base), MSAConfig)


def _limit(settings: Settings, model: PreTrainedModel) -> int:
    """Tokens that a document or a row may have; rows start at the model's `first_position`."""
    positions = position_limit(model.config)
    if positions is None:
        return settings.max_length
    return min(settings.max_length, positions - model.config.first_position)


def _room(settings: Settings, model: PreTrainedModel) -> str:
    """The room that the model's positions leave for `max_length`, in words behind it."""
    positions = position_limit(model.config)
    if positions is None:
        return ""
    room = positions - model.config.first_position
    return f"; the model has positions for {room} tokens" + (" and no more" if room < settings.max_length else "")


def _time_on_cpu(
    settings: Settings,
    model: MSAForCausalLM,
    collator: QuestionCollator | TranscriptCollator,
    rows: Sequence[int],
    held_out: Sequence[Question],
    begun: int,
) -> str | None:
    """A line on how long the run will take on a CPU; None for a short one.

    Args:
        rows: tokens of the questions with what they read and their answers.
        begun: steps that an interrupted run has done.
    """
    lengths, pool = list(collator.lengths.values()), min(settings.pool, len(collator.lengths))
    work = Work(
        steps=settings.steps - begun,
        every=settings.eval_every or settings.steps,
        pool=pool,
        corpus=len(lengths) if held_out else 0,
        sample=0,
        passage_tokens=sum(lengths) / len(lengths),
        question_tokens=sum(rows) / len(rows) * settings.batch_size / pool,  # to each document of a pool
        measured=len(held_out),
        mined=0,
    )
    return describe_time(work, seconds_per_token(model, lengths), ("steps", "pool"))


def _check_output(settings: Settings) -> None:
    """Nothing of another kind may lie where the result goes: loading a mixture of both would do the wrong thing."""
    output, base = Path(settings.output), Path(settings.base)
    if output.is_dir() and base.is_dir() and output.samefile(base):
        raise SettingError("output", "{} {}: is the base itself; give another directory", output)
    whole = settings.method != LORA or settings.merge
    other, kind = ("adapter_config.json", "an adapter") if whole else ("config.json", "a checkpoint")
    if (output / other).exists():
        raise SettingError("output", "{} {}: holds {}; give another directory", output, kind)


def protocol_of(base: str) -> PromptProtocol | None:
    """The protocol that lies beside a checkpoint; None where there is none.

    Raises:
        SettingError: for one that is damaged, and where the Hub does not say if there is one.
    """
    try:
        return protocol_beside(base)
    except ValueError as error:
        raise SettingError("base", "{} {}", error) from None
    except BankUnavailable as error:
        raise SettingError("base", "{} {}: {}", base, error) from None


# The run --------------------------------------------------------------------------------------------------------------


def make_trainer(prepared: Prepared) -> MemoryTrainer:
    """A Trainer for a prepared run.

    Raises:
        TrainingError: for several GPUs in one process, which Trainer would split batches over.
    """
    settings = prepared.settings
    names = {field.name for field in fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    arguments = TrainingArguments(
        output_dir=settings.output,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.steps // 20,
        logging_steps=max(1, settings.steps // 20),
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or settings.steps,
        save_total_limit=1,
        report_to=settings.report_to,
        seed=settings.seed,
        bf16=settings.bf16,
        use_cpu=not torch.accelerator.is_available(),  # said aloud, or bf16 and several processes do not work there
        use_cache=getattr(prepared.model.config, "use_cache", True),  # or the saved configuration would say False
        remove_unused_columns=False,  # the collator reads what the model's forward does not take
        label_names=["labels"],
        **{checkpointing: settings.gradient_checkpointing},
    )
    if arguments.n_gpu > 1:
        raise TrainingError("several GPUs: start this with `accelerate launch`, or name one in CUDA_VISIBLE_DEVICES")
    return MemoryTrainer(
        prepared.model,
        arguments,
        data_collator=prepared.collator,
        train_dataset=prepared.training,
        router_learning_rate=settings.router_learning_rate,
        warmup=RouterWarmup(settings.warmup_steps),
        callbacks=[ResumeDrawing(prepared.collator)],
    )


def train(prepared: Prepared, trainer: MemoryTrainer, guard: CollapseGuard | None = None) -> Result:
    """Run, measure and save.

    Args:
        prepared: the run.
        trainer: what `make_trainer` made of it.
        guard: judges the measurements; default one with its own defaults.

    Raises:
        CollapsedError: where the guard ends the run; nothing is saved then but the curve and the last checkpoint.
    """
    settings, output = prepared.settings, Path(prepared.settings.output)
    monitor = None
    if prepared.held_out:
        monitor = RouterMonitor(
            prepared.tokenizer,
            prepared.documents,
            prepared.held_out,
            every=settings.eval_every or settings.steps + 1,
            guard=CollapseGuard() if guard is None else guard,
            protocol=prepared.protocol,
        )
        monitor.log = trainer.log
    curve = Curve(output / CURVE_FILE, monitor)
    if prepared.checkpoint is not None:
        curve.resume(int(prepared.checkpoint.name.rpartition("-")[2]))
    if monitor is not None:
        trainer.add_callback(monitor)
    trainer.add_callback(curve)
    is_main_process = trainer.is_world_process_zero()
    if is_main_process and prepared.checkpoint is None:
        (output / SETTINGS_FILE).write_text(json.dumps(prepared.record, indent=2) + "\n", encoding="utf-8")
    try:
        trainer.train(resume_from_checkpoint=None if prepared.checkpoint is None else str(prepared.checkpoint))
        if monitor is not None and monitor.measurements[-1]["step"] < trainer.state.global_step:
            monitor.measure(trainer.model, trainer.state.global_step)
    except BaseException as error:
        progress = trainer.pop_callback(ProgressCallback)
        if progress is not None and progress.training_bar is not None:
            progress.training_bar.close()  # or what is said next stands behind it
        step = trainer.state.global_step
        if isinstance(error, NotFiniteError) and step:  # before the first step they are the base's own
            raise CollapsedError(f"The run has collapsed at step {step}: {error}") from error
        raise
    finally:
        trainer.warmup.restore()
    load_expression = _save(prepared, trainer)
    if is_main_process:
        curve.write(trainer.state)
        for path in checkpoints_in(output):  # of no more use
            shutil.rmtree(path)
    measurements = [] if monitor is None else monitor.measurements
    return Result(
        measurements,
        summary(curve.rows, measurements, len(prepared.documents)),
        load_expression,
        output,
        is_main_process,
    )


def _save(prepared: Prepared, trainer: MemoryTrainer) -> str:
    """Save the result; the expression that loads it."""
    settings, model = prepared.settings, prepared.model
    model.config.routers_trained = True
    whole = settings.method != LORA
    if settings.merge:
        whole = True
        if trainer.is_world_process_zero():
            model.merge_and_unload().save_pretrained(settings.output)
    else:
        trainer.save_model(settings.output)
    if trainer.is_world_process_zero():
        Path(settings.output, "training_args.bin").unlink(missing_ok=True)  # a pickle, of interest to this run alone
        prepared.tokenizer.save_pretrained(settings.output)
        if prepared.protocol is not None:
            prepared.protocol.save_pretrained(settings.output)
        if not whole:
            save_adapter_memory(model.config, settings.output)
    if whole:
        return f"MSAForCausalLM.from_pretrained({settings.output!r})"
    make = "from_pretrained" if _is_retrofit(settings.base) else "from_base"
    memory = f"top_k={model.config.top_k}, chunk_size={model.config.chunk_size}, routers_trained=True"
    return f"PeftModel.from_pretrained(MSAForCausalLM.{make}({settings.base!r}, {memory}), {settings.output!r})"
