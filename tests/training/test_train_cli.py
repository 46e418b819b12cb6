"""`msa-hf train`: the two phases, the routers' own rate, what is saved, measured and resumed, and what is refused."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import base_model
from peft import PeftModel
from setups import assert_same
from test_finetune import DOCUMENTS, NAMES, QUESTIONS, document_rows, word_tokenizer, write
from transformers import TrainerCallback

from msa_hf import MSAForCausalLM
from msa_hf.cli import main
from msa_hf.model.retrofit_msa import ROUTER_MODULES
from msa_hf.training import CollapsedError, CollapseGuard, finetune, router_recall
from msa_hf.training.adapter_memory import ADAPTER_MEMORY
from msa_hf.training.finetune import make_trainer, prepare, split, train
from msa_hf.training.settings import Settings

# PEFT asks a model for a property by the name that the newer transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

OWN = (0.7, 0.3)  # the base's weights of the two losses, unlike those of either phase
WARMUP = (0.1, 1.0)
TINY: dict[str, Any] = {"pool": 24, "batch-size": 8, "rank": 4, "held-out": 8, "learning-rate": 1e-2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a memory and score bias, and a tokenizer."""
    directory = tmp_path_factory.mktemp("base")
    weights = {"lm_loss_weight": OWN[0], "aux_loss_weight": OWN[1]}
    model = MSAForCausalLM.from_base(base_model("qwen3"), top_k=2, chunk_size=2, score_bias=True, **weights)
    model.save_pretrained(directory)
    word_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    write(directory / "documents.jsonl", document_rows())
    write(directory / "questions.jsonl", QUESTIONS)
    return directory


def command(base: Any, data: Path, out: Path, **extra: Any) -> list[str]:
    """A command line; True stands for an option without a value."""
    places = {"documents": data / "documents.jsonl", "questions": data / "questions.jsonl"}
    places = {name: extra.pop(name, path) for name, path in places.items()}
    options = {**TINY, **extra}
    given = [item for name, value in options.items() for item in (f"--{name}", *([] if value is True else [value]))]
    return [str(item) for item in ("train", base, places["documents"], places["questions"], out, *given)]


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainers that are made; `callbacks` of the list are added to them."""

    class Kept(list):
        callbacks: list[TrainerCallback] = []

    kept = Kept()

    def keep(prepared: Any) -> Any:
        kept.append(make_trainer(prepared))
        for callback in kept.callbacks:
            kept[-1].add_callback(callback)
        return kept[-1]

    monkeypatch.setattr(finetune, "make_trainer", keep)
    return kept


def curve(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of training, and measurements."""
    rows = [json.loads(line) for line in (out / finetune.CURVE_FILE).read_text().splitlines()]
    return [row for row in rows if "loss" in row], [row for row in rows if "recall" in row]


def logits_of(model: Any) -> torch.Tensor:
    """For a few questions, with a bank of all documents."""
    tokenizer, modes = word_tokenizer(), [(module, module.training) for module in model.modules()]
    model.eval()
    ids = tokenizer([question["question"] for question in QUESTIONS[:5]], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        bank = model.encode_documents(document_rows(), tokenizer, show_progress=False)
        logits = model(input_ids=ids, memory=bank).logits
    for module, mode in modes:
        module.training = mode
    return logits


class AtEnd(TrainerCallback):
    """Keeps the logits of the trained model, before it is saved."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logits = logits_of(kwargs["model"])


class Interrupt(TrainerCallback):
    """Ends the run as the user would, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def weights_of(config: Any) -> tuple[float, float]:
    return config.lm_loss_weight, config.aux_loss_weight


# What is saved --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "merge"])
def test_the_printed_expression_loads_what_was_trained(method, base, data, tmp_path, trainers, capsys) -> None:
    """An adapter, or a checkpoint with its tokenizer that needs nothing else; with the trained model's logits, which
    are not the base's."""
    at_end = AtEnd()
    trainers.callbacks = [at_end]
    assert main(command(base, data, tmp_path / "out", steps=3, **{method: True})) == 0
    expression = capsys.readouterr().out.splitlines()[-1]
    assert expression.strip().startswith("PeftModel." if method == "lora" else "MSAForCausalLM.from_pretrained(")
    loaded = eval(expression, {"PeftModel": PeftModel, "MSAForCausalLM": MSAForCausalLM})
    assert_same(logits_of(loaded), at_end.logits, tolerance=1e-5 if method == "merge" else 1e-6)
    assert float((logits_of(MSAForCausalLM.from_pretrained(base)) - at_end.logits).abs().max()) > 1e-2
    start = MSAForCausalLM.from_pretrained(base).config
    assert loaded.config.routers_trained is True and start.routers_trained is False
    assert weights_of(loaded.config) == OWN and loaded.config.use_cache is start.use_cache is True
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("config.json" in names) == (method != "lora")
    assert ({"adapter_config.json", ADAPTER_MEMORY} <= names) == (method == "lora")
    assert {"tokenizer.json", finetune.CURVE_FILE} <= names
    assert not any(name.startswith("checkpoint-") or name.endswith((".bin", ".pt")) for name in names)


def test_documents_can_be_a_folder(base, data, tmp_path) -> None:
    """Whose files are named in `positives` by their path."""
    for key, text in DOCUMENTS.items():
        path = tmp_path / "folder" / key / "text.md"
        path.parent.mkdir(parents=True)
        path.write_text(text)
    questions = [{**row, "positives": [f"{key}/text.md" for key in row["positives"]]} for row in QUESTIONS]
    write(tmp_path / "q.jsonl", questions)
    places = {"documents": tmp_path / "folder", "questions": tmp_path / "q.jsonl"}
    assert main(command(base, data, tmp_path / "out", steps=1, **places)) == 0


# Phases and rates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share, warm", [(0.6, 4), (1, 6)], ids=["rounded", "nothing-else"])
def test_warm_up_weighs_the_router_first(share, warm, base, data, tmp_path, trainers) -> None:
    """Its weights stand in the configuration while its steps are computed and at no other time; what follows has the
    configuration's own. The curve says which phase a step belonged to, and gives the losses unweighted."""
    during: list[tuple[float, float]] = []
    between: list[tuple[float, float]] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            def before(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
                if "documents" in keywords:
                    during.append(weights_of(module.config))

            kwargs["model"].register_forward_pre_hook(before, with_kwargs=True)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            saved = MSAForCausalLM.from_pretrained(Path(args.output_dir, f"checkpoint-{state.global_step}"))
            between.extend([weights_of(kwargs["model"].config), weights_of(saved.config)])

    trainers.callbacks = [Watch()]
    extra = {"warmup-share": share, "save-every": 1, "full": True}
    assert main(command(base, data, tmp_path / "out", steps=6, **extra)) == 0
    assert during == [WARMUP] * warm + [OWN] * (6 - warm)
    assert between == [OWN] * 12
    rows, _ = curve(tmp_path / "out")
    assert [row["phase"] for row in rows] == ["warm-up"] * warm + ["main"] * (6 - warm)
    for row, (language, router) in zip(rows, during, strict=True):
        assert row["loss"] == pytest.approx(language * row["lm_loss"] + router * row["aux_loss"], rel=1e-5)


def test_an_error_in_a_step_of_the_warm_up_leaves_the_weights_alone(base, data, tmp_path, monkeypatch) -> None:
    settings = Settings(str(base), str(tmp_path / "out"), steps=2, pool=24, warmup_share=1.0, held_out=0)
    prepared = prepare(settings, DOCUMENTS, QUESTIONS)
    trainer = make_trainer(prepared)

    def fail(*args: Any, **kwargs: Any) -> Any:
        assert weights_of(prepared.model.config) == WARMUP
        raise RuntimeError("out of memory")

    monkeypatch.setattr(trainer, "compute_loss", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(prepared, trainer)
    assert weights_of(prepared.model.config) == OWN


@pytest.mark.parametrize("method", ["lora", "full"])
def test_routers_have_a_rate_of_their_own(method, base, data, tmp_path) -> None:
    """Projections and the slope of the score bias, and nothing else; every trainable weight stands in one group; and
    the first step moves each by its own rate."""
    rates = {False: 1e-4, True: 1e-2}
    settings = Settings(
        str(base),
        str(tmp_path / "out"),
        method,
        steps=1,
        pool=24,
        learning_rate=rates[False],
        router_learning_rate=rates[True],
        held_out=0,
    )
    prepared = prepare(settings, DOCUMENTS, QUESTIONS)
    trainer = make_trainer(prepared)
    optimizer = trainer.create_optimizer()
    names = {id(weight): name for name, weight in prepared.model.named_parameters()}
    groups = {group["lr"]: {names[id(weight)] for weight in group["params"]} for group in optimizer.param_groups}
    trainable = {name for name, weight in prepared.model.named_parameters() if weight.requires_grad}
    routers = {name for name in trainable if any(module in name for module in ROUTER_MODULES)}
    assert len(routers) == 6  # two projections and a slope in each of two layers
    assert groups == {rates[True]: routers, rates[False]: trainable - routers}
    before = {name: weight.detach().clone() for name, weight in prepared.model.named_parameters() if name in trainable}
    train(prepared, trainer)
    # Adam's first step moves every weight with a gradient by the rate.
    moved = {
        name: float((weight.detach() - before[name]).abs().max())
        for name, weight in prepared.model.named_parameters()
        if name in trainable
    }
    for name in routers:
        assert moved[name] == pytest.approx(rates[True], rel=1e-3), name
    assert max(moved[name] for name in trainable - routers) == pytest.approx(rates[False], rel=1e-3)


def test_the_rates_keep_their_proportion(base, data, tmp_path) -> None:
    """Over the whole schedule, whose peak they reach."""
    rates = {"learning-rate": 3e-4, "router-learning-rate": 6e-3}
    assert main(command(base, data, tmp_path / "out", steps=8, **rates)) == 0
    rows, _ = curve(tmp_path / "out")
    assert len(rows) == 8 and rows[0]["learning_rate"] == pytest.approx(3e-4)
    assert rows[-1]["learning_rate"] < 0.1 * rows[0]["learning_rate"]
    for row in rows:
        assert row["router_learning_rate"] == pytest.approx(20 * row["learning_rate"])


# Measurements ---------------------------------------------------------------------------------------------------------


def test_held_out_questions_are_measured_from_the_untrained_router_on(base, data, tmp_path, capsys) -> None:
    """Before the first step, every so many steps and after the last: on a bank of all documents, with questions that
    are not trained on. No line of training is lost where both are due, and the table shows the first and last."""
    extra = {"eval-every": 2, "router-learning-rate": 2e-2, "full": True}
    assert main(command(base, data, tmp_path / "out", steps=5, **extra)) == 0
    lines, measured = curve(tmp_path / "out")
    assert [row["step"] for row in lines] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in measured] == [0, 2, 4, 5]
    training, held_out = split(QUESTIONS, 8, 0)
    assert len(held_out) == 8 and sorted(map(str, [*training, *held_out])) == sorted(map(str, QUESTIONS))
    tokenizer = word_tokenizer()
    for directory, row in ((base, measured[0]), (tmp_path / "out", measured[-1])):
        model = MSAForCausalLM.from_pretrained(directory).eval()
        bank = model.encode_documents(document_rows(), tokenizer, show_progress=False)
        found = router_recall(model, tokenizer, bank, held_out)
        assert json.loads(json.dumps(found)) == {name: row[name] for name in found}
    printed = capsys.readouterr().out
    assert f"8 held-out questions, bank of {NAMES} documents" in printed
    any_layer = re.search(r"any layer +(\d\.\d{3}) +(\d\.\d{3})", printed)
    assert any_layer is not None
    assert any_layer.groups() == (f"{measured[0]['recall']:.3f}", f"{measured[-1]['recall']:.3f}")
    assert re.search(rf"^ *5 +main +{lines[-1]['lm_loss']:.3f} +{lines[-1]['aux_loss']:.3f}$", printed, re.MULTILINE)


def test_measurements_only_before_and_after(base, data, tmp_path) -> None:
    assert main(command(base, data, tmp_path / "out", steps=3, **{"eval-every": 0})) == 0
    assert [row["step"] for row in curve(tmp_path / "out")[1]] == [0, 3]


@pytest.mark.parametrize("collapses", [True, False])
def test_a_collapsed_router_ends_the_run(collapses, base, data, tmp_path, trainers, monkeypatch, capsys) -> None:
    """At the measurement that shows it, with one line and exit code 1; the curve up to there is kept, and nothing is
    saved that could be taken for a result. Held against a run of the same model that its guard lets pass."""
    least = 1.0 if collapses else 0.0

    class OneDocument(TrainerCallback):
        """Makes every question choose the same documents."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for name, weight in kwargs["model"].named_parameters():
                if "router_q_proj" in name:
                    weight.data.zero_()

    trainers.callbacks = [OneDocument()]
    guard = CollapseGuard(patience=2, distinct_share=least, recall_share=0)
    monkeypatch.setattr(finetune, "CollapseGuard", lambda: guard)
    out, extra = tmp_path / "out", {"eval-every": 2, "full": True}
    code = main(command(base, data, out, steps=8, **extra))
    lines, measured = curve(out)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("msa-hf: error: ")]
    if collapses:
        assert code == 1 and trainers[0].state.global_step == 4
        assert [row["step"] for row in measured] == [0, 2, 4]
        assert len(said) == 1 and "collapsed at step 4" in said[0] and "2 for 8 questions" in said[0]
        assert not (out / "model.safetensors").exists() and not (out / "config.json").exists()
    else:
        assert code == 0 and said == [] and lines[-1]["step"] == 8


def test_states_that_are_no_numbers_are_a_collapse(base, data, tmp_path, capsys) -> None:
    """Weights so large that hidden states overflow, while they are numbers themselves."""
    extra = {"eval-every": 0, "full": True, "learning-rate": 1e30, "warmup-share": 0}
    assert main(command(base, data, tmp_path / "out", steps=3, **extra)) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("msa-hf: error: ")]
    assert len(said) == 1 and "The run has collapsed at step " in said[0]
    assert not (tmp_path / "out" / "config.json").exists()


# Interrupted runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora"])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(method, base, data, tmp_path, trainers) -> None:
    """From the last whole checkpoint, in the middle of an epoch and of the warm-up: weights, losses and measurements
    are those of a run without a break, to the bit."""
    extra = {method: True, "save-every": 3, "eval-every": 2, "warmup-share": 0.5, "learning-rate": 1e-3}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(command(base, data, whole, steps=10, **extra)) == 0
    trainers.callbacks = [Interrupt(5)]
    assert main(command(base, data, broken, steps=10, **extra)) == 130
    assert [path.name for path in finetune.checkpoints_in(broken)] == ["checkpoint-3"]
    (broken / "checkpoint-5").mkdir()  # cut short while it was written
    with (broken / finetune.CURVE_FILE).open("a") as file:
        file.write('{"step": 5, "lo')
    trainers.callbacks = []
    assert main(command(base, data, broken, steps=10, resume=True, **extra)) == 0
    assert curve(broken) == curve(whole)
    ours, theirs = (trainer.model.state_dict() for trainer in (trainers[2], trainers[0]))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {path.name for path in broken.iterdir()} == {path.name for path in whole.iterdir()}


def test_the_guard_remembers_what_came_before_the_break(base, data, tmp_path, trainers, monkeypatch) -> None:
    """The untrained router, to which it compares, and how often it has warned already."""
    seen: list[list[int]] = []

    class Guard(CollapseGuard):
        def __init__(self) -> None:
            super().__init__()
            seen.append([])

        def check(self, router: Any = None, loss: Any = None, empty: Any = None, step: int | None = None) -> None:
            if router is not None:
                assert step is not None and all(isinstance(layer, int) for layer in router["distinct"])
                seen[-1].append(step)
            super().check(router, loss, empty, step)

    monkeypatch.setattr(finetune, "CollapseGuard", Guard)
    extra = {"save-every": 4, "eval-every": 2}
    trainers.callbacks = [Interrupt(5)]
    assert main(command(base, data, tmp_path / "out", steps=8, **extra)) == 130
    trainers.callbacks = []
    assert main(command(base, data, tmp_path / "out", steps=8, resume=True, **extra)) == 0
    assert seen == [[0, 2, 4], [0, 2, 4, 6, 8]]


@pytest.fixture(scope="module")
def interrupted(base, data, tmp_path_factory) -> Path:
    """A directory in which a run of 4 steps was interrupted after a checkpoint."""
    out = tmp_path_factory.mktemp("interrupted")
    settings = Settings(str(base), str(out), steps=4, pool=24, rank=4, held_out=8, learning_rate=1e-2, save_every=1)
    prepared = prepare(settings, DOCUMENTS, QUESTIONS)
    trainer = make_trainer(prepared)
    trainer.add_callback(Interrupt(3))
    with pytest.raises(KeyboardInterrupt):
        train(prepared, trainer)
    return out


@pytest.mark.parametrize(
    "extra, message",
    [
        ({}, "OUT {out}: holds checkpoint-2 of an interrupted run; go on with --resume, or give another directory"),
        ({"resume": True, "steps": 5}, "--steps is 5, but was 4 in the interrupted run"),
        ({"resume": True, "router-learning-rate": 2e-3}, "--router-learning-rate is 0.002, but was 0.001 in the"),
        ({"resume": True, "full": True}, "--method is full, but was lora in the interrupted run"),
        ({"resume": True, "questions": "fewer"}, "--resume: the interrupted run had other documents or questions"),
    ],
    ids=["afresh", "steps", "rate", "method", "data"],
)
def test_another_run_does_not_go_on_with_an_interrupted_one(
    extra, message, interrupted, base, data, tmp_path, capsys
) -> None:
    if "questions" in extra:
        extra = {**extra, "questions": write(tmp_path / "fewer.jsonl", QUESTIONS[:-1])}
    assert message.format(out=interrupted) in refusal(capsys, command(base, data, interrupted, **{"steps": 4, **extra}))
    assert (interrupted / "checkpoint-2").exists()


# Mistakes -------------------------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run what must fail; the one line that it says."""
    capsys.readouterr()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("msa-hf: error: ")]
    assert printed.out == "" and len(lines) == 1 and "Traceback" not in printed.err
    assert printed.err.rstrip().endswith(lines[0])
    return lines[0]


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"documents": "none.jsonl"}, "none.jsonl: no such file or directory"),
        ({"documents": []}, "documents.jsonl: no documents"),
        ({"documents": ["{"]}, "documents.jsonl, line 1: not valid JSON"),
        ({"questions": "none.jsonl"}, "none.jsonl: No such file or directory"),
        ({"questions": []}, "questions.jsonl: holds no questions"),
        (
            {"questions": [{**QUESTIONS[0], "positives": ["d99"]}]},
            "questions.jsonl, line 1: 'positives' names 'd99'",
        ),
        (
            {"questions": [{**question, "positives": []} for question in QUESTIONS]},
            "none of the 40 questions names a document that answers it",
        ),
        ({"top-k": 0}, "--top-k must be at least 1, got 0"),
        ({"pool": 0}, "--pool must be at least 1, got 0"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"steps": "many"}, "argument --steps: invalid int value: 'many'"),
        ({"warmup-share": 1.5}, "--warmup-share must be from 0 to 1, got 1.5"),
        ({"router-learning-rate": 0}, "--router-learning-rate must be above 0, got 0"),
        ({"learning-rate": "nan"}, "--learning-rate must be above 0, got nan"),
        ({"seed": -1}, "--seed must be from 0 to 4294967295, got -1"),
        ({"eval-every": -1}, "--eval-every must be at least 0, got -1"),
        ({"held-out": 21}, "--held-out 21: of 40 questions with positives at most 20 can be held out"),
        (
            {"max-length": 4},
            "'d2' has 5 tokens, above the limit of 4, and so are 12 others; split them into documents with keys",
        ),
        ({"merge": True, "full": True}, "--merge is for adapters; 'full' saves a whole checkpoint anyway"),
        ({"lora": True, "full": True}, "argument --full: not allowed with argument --lora"),
        ({"resume": True}, "holds no checkpoint of an interrupted run"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_are_one_line_and_exit_code_2(extra, message, base, data, tmp_path, capsys) -> None:
    """And nothing is written. Lists stand for files with these lines."""
    extra = {
        name: write(tmp_path / f"{name}.jsonl", value) if isinstance(value, list) else value
        for name, value in extra.items()
    }
    assert message in refusal(capsys, command(base, data, tmp_path / "out", **extra))
    assert not (tmp_path / "out").exists()


LONG = "word " * 300


@pytest.mark.parametrize(
    "extra, messages",
    [
        (
            {"documents": [*document_rows(), {"key": "long", "text": LONG}]},
            ["'long' has 300 tokens, above the limit of 254; split it into", "(--max-length 1024", "254 tokens and no"],
        ),
        (
            {"documents": [*document_rows(), {"key": "long", "text": LONG}], "max-length": 200},
            ["above the limit of 200; split it", "(--max-length 200; the model has positions for 254 tokens)"],
        ),
        (
            {"questions": [*QUESTIONS, {**QUESTIONS[0], "question": LONG}]},
            ["Question 'word word", "tokens with its answer, above the limit of 254; shorten these."],
        ),
        (
            {"questions": [*QUESTIONS, {**QUESTIONS[0], "answer": " \n"}]},
            ["line 41: 'answer' must be text that is not empty"],
        ),
    ],
    ids=["documents above all positions", "documents above the length", "question", "blank answer"],
)
def test_what_is_too_long_or_empty_is_named_with_the_remedy(extra, messages, base, data, tmp_path, capsys) -> None:
    extra = {
        name: write(tmp_path / f"{name}.jsonl", value) if isinstance(value, list) else value
        for name, value in extra.items()
    }
    said = refusal(capsys, command(base, data, tmp_path / "out", **extra))
    assert all(message in said for message in messages)


def test_a_long_run_on_a_cpu_says_so_before_it_begins(base, data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(finetune, "seconds_per_token", lambda model, lengths: 1.0)
    rows = {row["key"]: row["text"] for row in document_rows()}
    given = Settings(base=str(base), output=str(tmp_path), pool=12, steps=400, batch_size=4, eval_every=50, held_out=8)
    *_, line = prepare(given, rows, QUESTIONS).notes
    assert re.match(
        rf"about .* h on this CPU: 400 steps of 12 texts, and {len(rows)} texts encoded every 50 steps; ", line
    )
    assert "with --steps 30." in line
    *_, line = prepare(replace(given, held_out=0), rows, QUESTIONS).notes
    assert "encoded" not in line


def test_bases_that_are_none_are_refused(data, tmp_path, capsys) -> None:
    """A path that does not exist, and a directory without a model."""
    out = tmp_path / "out"
    assert f"{tmp_path}/none: no such directory" in refusal(capsys, command(tmp_path / "none", data, out))
    assert f"MODEL {data}: " in refusal(capsys, command(data, data, out))
    assert not out.exists()


@pytest.mark.parametrize(
    "there, extra, message",
    [
        ("base", {}, "is the base itself; give another directory"),
        ("file", {}, "out: not a directory"),
        ("config.json", {}, "out: holds a checkpoint; give another directory"),
        ("adapter_config.json", {"full": True}, "out: holds an adapter; give another directory"),
        ("adapter_config.json", {"merge": True}, "out: holds an adapter; give another directory"),
    ],
)
def test_places_where_nothing_can_be_saved_are_refused(there, extra, message, base, data, tmp_path, capsys) -> None:
    """Nor is anything changed there: the base itself, by another name; a file; a result of the other kind."""
    out = tmp_path / "out"
    if there == "base":
        out.symlink_to(base)
    elif there == "file":
        out.write_text("")
    else:
        out.mkdir()
        (out / there).write_text("{}")
    before = sorted(out.rglob("*")) if out.is_dir() else []
    assert message in refusal(capsys, command(base, data, out, **extra))
    assert (sorted(out.rglob("*")) if out.is_dir() else []) == before


@pytest.mark.parametrize("library, extra", [("accelerate", {}), ("accelerate", {"full": True}), ("peft", {})])
def test_missing_libraries_are_named(library, extra, base, data, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    line = refusal(capsys, command(base, data, tmp_path / "out", **extra))
    assert f"training needs {library}: pip install msa-hf[train]" in line


def test_a_whole_model_is_trained_without_peft(base, data, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(command(base, data, tmp_path / "out", steps=1, full=True)) == 0


def test_several_gpus_in_one_process_are_refused(base, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(finetune.TrainingArguments, "n_gpu", 2)
    prepared = prepare(Settings(str(base), str(tmp_path / "out"), held_out=0), DOCUMENTS, QUESTIONS)
    with pytest.raises(finetune.TrainingError, match="accelerate launch"):
        make_trainer(prepared)


def test_a_pool_that_leaves_nothing_out_is_remarked_on(base, data, tmp_path, capsys) -> None:
    extra = {"pool": 2, "batch-size": 2}
    assert main(command(base, data, tmp_path / "out", steps=1, **extra)) == 0
    assert "msa-hf: 2 documents a step, of which each layer reads 2" in capsys.readouterr().err


def test_collapse_is_no_mistake_of_the_users() -> None:
    """So it must not be reported as one."""
    assert not issubclass(CollapsedError, ValueError)
