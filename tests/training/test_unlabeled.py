"""`msa-hf train MODEL DOCUMENTS OUT`: routers from documents alone, or with questions; resumed, reported, refused."""

import itertools
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forking import ended, forked
from peft import PeftModel
from safetensors.torch import load_file
from small_corpus import notes, save_base, save_notes, tokenizer_of_notes

from msa_hf import MSAForCausalLM
from msa_hf.cli import main
from msa_hf.data.questions import Question
from msa_hf.training import router_run
from msa_hf.training.asked_questions import ASKED_FILE
from msa_hf.training.mining import TokenStore
from msa_hf.training.monitor import CollapseGuard
from msa_hf.training.pairs import words
from msa_hf.training.pools import PoolDrawer, Round
from msa_hf.training.router_run import CURVE_FILE, PLOT_FILE, train_routers
from msa_hf.training.router_settings import RouterSettings
from msa_hf.training.unlabeled import CHECKPOINT_FILE, prepare_routers

# PEFT asks a model for a property by the name that the newer transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TINY: dict[str, Any] = {"pool": 24, "rank": 4, "steps": 7, "eval-every": 4, "save-every": 3, "held-out": 10}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unlabeled")
    save_base(root / "base")
    save_notes(root / "notes")
    return root


def command(place: Path, out: Path, documents: Path | None = None, **extra: Any) -> list[str]:
    """A command line; True stands for an option without a value."""
    options = {**TINY, **{name.replace("_", "-"): value for name, value in extra.items()}}
    given = [item for name, value in options.items() for item in (f"--{name}", *([] if value is True else [value]))]
    return [str(item) for item in ("train", place / "base", documents or place / "notes", *given, out)]


def lines(out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of training, and measurements."""
    rows = [json.loads(line) for line in (out / CURVE_FILE).read_text().splitlines()]
    return [row for row in rows if "loss" in row], [row for row in rows if "recall" in row]


def settings(place: Path, out: Path, **extra: Any) -> RouterSettings:
    given = {**{name.replace("-", "_"): value for name, value in TINY.items()}, **extra}
    return RouterSettings(str(place / "base"), str(out), **given)


def routed(model: Any) -> torch.Tensor:
    """Scores of all notes for a few questions."""
    tokenizer = tokenizer_of_notes()
    bank = model.eval().encode_documents(list(notes().values()), tokenizer, show_progress=False)
    ids = tokenizer(["w0x1 w0x2", "w3x1 in w3x4"], return_tensors="pt", padding=True, padding_side="left")["input_ids"]
    with torch.no_grad():
        routing = model(input_ids=ids, memory=bank, output_document_scores=True).routing
    return torch.cat([item.document_scores for item in routing.values()])


def test_documents_alone_train_routers(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss falls, and held-out notes are found more often than by chance, by the untrained router and by the one
    that training began with."""
    options = {"steps": 60, "pool": 64, "rank": 32, "learning-rate": 3e-2, "router-learning-rate": 1e-2}
    options |= {"eval-every": 30, "save-every": 0, "held-out": 40}
    assert main(command(place, tmp_path, **options)) == 0
    steps, measured = lines(tmp_path)
    given, begun, *_, last = measured
    losses = [row["loss"] for row in steps]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert given["as_given"] and [row["step"] for row in measured] == [0, 0, 30, 60]
    assert last["recall"] > begun["recall"] + 0.1 and last["recall"] > 2 * max(last["chance"], given["recall"])
    assert (
        last["others"]["bm25"] == given["others"]["bm25"] > 0.9 and last["passages"] == 96 and last["questions"] == 40
    )
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "tokenizer.json", "memory_protocol.json"}
    assert (tmp_path / PLOT_FILE).stat().st_size > 5_000 and not (tmp_path / CHECKPOINT_FILE).exists()
    said = capsys.readouterr()
    assert f"untrained router  {given['recall']:.3f}" in said.out and "bm25" in said.err and "chance" in said.err
    model = eval(said.out.splitlines()[-1])
    assert model.config.routers_trained is True and model.config.query_reduction == "mean"

    # What comes out is encoded and asked as any checkpoint.
    assert main(["encode", str(tmp_path), str(place / "notes"), str(tmp_path / "bank")]) == 0
    assert main(["ask", str(tmp_path), str(tmp_path / "bank"), "w0x1 w0x2", "--max-new-tokens", "2", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["sources"] and "untrained" not in said.err


def test_a_killed_run_goes_on_as_if_it_had_not_been(place: Path, tmp_path: Path, capsys) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_routers(prepare_routers(settings(place, whole), notes()))

    def run_and_die() -> None:
        prepared = prepare_routers(settings(place, killed), notes())
        train_routers(prepared, after_step=lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == 5 else None)

    assert ended(forked(run_and_die)) == [-signal.SIGKILL]
    assert (killed / CHECKPOINT_FILE).exists() and not (killed / "config.json").exists()

    refused = {  # before it goes on
        "holds an interrupted run; go on with --resume": settings(place, killed),
        "was 7 in the interrupted run": settings(place, killed, steps=8, resume=True),
        "holds no checkpoint": settings(place, tmp_path / "none", resume=True),
    }
    for message, wrong in refused.items():
        with pytest.raises(ValueError, match=message):
            prepare_routers(wrong, notes())
    with pytest.raises(ValueError, match="other documents"):
        prepare_routers(settings(place, killed, resume=True), notes(seed=1))

    train_routers(prepare_routers(settings(place, killed, resume=True), notes()))
    ours, theirs = load_file(killed / "model.safetensors"), load_file(whole / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=1e-5, msg=name)
    kept = {"step", "loss", "recall", "kinds"}
    for one, other in zip(lines(killed), lines(whole), strict=True):
        assert [row["step"] for row in one] == [row["step"] for row in other]
        for row, expected in zip(one, other, strict=True):
            assert all(row[name] == pytest.approx(expected[name], rel=1e-4) for name in kept & expected.keys())


def test_an_adapter_routes_as_the_checkpoint(place: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    found = {}
    for kind in ("checkpoint", "adapter"):
        assert main(command(place, tmp_path / kind, **({"adapter": True} if kind == "adapter" else {}))) == 0
        expression = capsys.readouterr().out.splitlines()[-1]
        model = eval(expression, {"PeftModel": PeftModel, "MSAForCausalLM": MSAForCausalLM})
        found[kind] = routed(model)
        assert model.config.routers_trained is True
    torch.testing.assert_close(found["adapter"], found["checkpoint"], atol=1e-5, rtol=1e-4)
    assert not (tmp_path / "adapter" / "config.json").exists()
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    import merge_adapter

    merge_adapter.merge(str(place / "base"), tmp_path / "adapter", tmp_path / "merged", torch.float32)
    merged = MSAForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(routed(merged), found["checkpoint"], atol=1e-5, rtol=1e-4)
    assert merged.config.to_diff_dict() == MSAForCausalLM.from_pretrained(tmp_path / "checkpoint").config.to_diff_dict()


def test_questions_are_mixed_in_and_train_the_reader(place: Path, tmp_path: Path, capsys) -> None:
    """From a checkpoint with two memory layers, as `retrofit` makes it; a teacher's labels beside them."""
    rows = [
        {"question": f"{words(text)[0]} {words(text)[1]} about", "answer": words(text)[2], "positives": [f"{key}.md"]}
        for key, text in list(notes().items())[:20]
    ]
    rows += [{"question": "what does nobody know", "answer": "unknown", "positives": []}]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "base").mkdir()
    model = MSAForCausalLM.from_base(place / "base", memory_layers=[0, 1], chunk_size=8, score_bias=True)
    model.save_pretrained(tmp_path / "base")
    tokenizer_of_notes().save_pretrained(tmp_path / "base")
    questions = {"questions": tmp_path / "questions.jsonl", "save-every": 0}
    assert main(command(tmp_path, tmp_path / "out", place / "notes", **questions)) == 0
    assert "1 of 21 questions name no document that answers them" in capsys.readouterr().err
    steps, measured = lines(tmp_path / "out")
    assert all(row["reading_loss"] > 0 for row in steps)
    assert measured[-1]["questions"] == 10 + 4 and "question" in measured[-1]["kinds"]
    trained = load_file(tmp_path / "out" / "model.safetensors")
    first = load_file(tmp_path / "base" / "model.safetensors")
    # Above the last memory layer there is only what reads.
    assert not torch.equal(trained["model.layers.1.mlp.down_proj.weight"], first["model.layers.1.mlp.down_proj.weight"])


def test_answers_stay_in_the_texts_that_labeled_questions_read(place: Path, tmp_path: Path) -> None:
    """Held-out passages lose the sentence that asks for them, but not the one that answers a labeled question; in
    pools such a passage is whole too."""
    questions: list[Question] = [
        {"question": f"what of {key}", "answer": " ".join(words(text)[-5:]), "positives": [key]}
        for key, text in notes().items()
    ]
    for seed in range(3):
        prepared = prepare_routers(settings(place, tmp_path / "out", seed=seed, held_out=40), notes(), questions)
        taken_out = 0
        for item in [*prepared.labeled, *prepared.measured]:
            text = " ".join(words(prepared.corpus[item.gold[-1]]))
            assert item.kind != "question" or (item.answer or "-") in text
            taken_out += item.kind != "question" and item.text is not None
        assert taken_out > 5
    coder, texts = prepared.coder, prepared.corpus
    store = TokenStore(coder.documents(texts, range(len(texts))))
    asked = {gold: item for item in prepared.labeled for gold in item.gold}
    drawer = PoolDrawer(prepared.maker, store, coder, set(), prepared.labeled, size=8)
    gold, seed = next(
        (pair.gold[0], pair)
        for pair in drawer.seeds(0, 90)
        if pair.text and len(pair.gold) == 1 and pair.gold[0] in asked
    )
    pool = drawer.draw(0, Round(0, [seed, asked[gold]], np.full((2, 1), -1)))
    assert pool.documents[pool.places.index(gold)] == store.row(gold)


def test_questions_about_a_document_that_stands_twice_are_kept(place: Path, tmp_path: Path) -> None:
    """Of two equal documents one is taken; a question that names the other, or both, asks for that one."""
    texts = {**notes(), "copy": notes()["note3"]}
    questions: list[Question] = [
        {"question": "one", "answer": "x", "positives": ["copy"]},
        {"question": "both", "answer": "x", "positives": ["note3", "copy"]},
    ]
    prepared = prepare_routers(settings(place, tmp_path / "out"), texts, questions)
    assert [item.gold for item in prepared.labeled] == [(3,), (3,)]
    assert prepared.notes[1:] == ["1 passages occur more than once and are taken once"]


def test_mined_passages_are_wrong_and_in_the_pools(place: Path, tmp_path: Path, monkeypatch) -> None:
    """Neither gold nor holding all of the question's words; those held out never ask."""
    drawn = []
    draw = PoolDrawer.draw

    def keep(self: PoolDrawer, step: int, round: Any) -> Any:
        drawn.append((round, draw(self, step, round), self))
        return drawn[-1][1]

    monkeypatch.setattr(PoolDrawer, "draw", keep)
    prepared = prepare_routers(settings(place, tmp_path / "out", save_every=0), notes())
    train_routers(prepared)
    assert len(drawn) == 7 and len({round.first for round, _, _ in drawn}) == 2
    held_out = {item.gold[-1] for item in prepared.measured}
    mined = 0
    for round, pool, drawer in drawn:
        for seed, misses in zip(round.seeds, round.misses.tolist(), strict=True):
            misses = [place for place in misses if place >= 0]
            mined += len(misses)
            assert seed.gold[-1] not in misses and len(set(misses)) == len(misses)
            assert not held_out & set(seed.gold[-1:])
            for wrong in misses:
                assert not set(words(seed.query)) <= set(words(prepared.corpus[wrong]))
        assert len(set(pool.places)) == len(pool.places) == len(pool.documents) == drawer.size
        assert pool.positives.any(1).all() and len(pool.queries) == len(pool.questions) == len(pool.positives)
        for number in pool.seeds:  # six seeds with three companions each have room
            misses = [place for place in round.misses[number].tolist() if place >= 0]
            assert sum(place in pool.places for place in misses) >= min(2, len(misses))
        asked_for = {pool.places[int(column)] for column in pool.positives.nonzero()[:, 1]}
        assert not asked_for & held_out
    assert mined > 4 * sum(len(round.seeds) for round, _, _ in drawn)


def test_a_teacher_labels_and_is_measured(place: Path, tmp_path: Path, monkeypatch) -> None:
    """One that knows the topic of a note: the same topic's notes share what soft labels give away."""

    class Knows:
        def embed(self, texts: Any) -> torch.Tensor:
            found = torch.zeros(len(texts), 16)
            for row, text in enumerate(texts):
                for topic in re.findall(r"w(\d+)x", text):
                    found[row, int(topic)] = 1.0
            return torch.nn.functional.normalize(found, dim=1)

    seen = []
    step = router_run.contrastive_step

    def keep(model: Any, documents: Any, questions: Any, targets: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(targets)
        return step(model, documents, questions, targets, *args, **kwargs)

    monkeypatch.setattr(router_run, "load_teacher", lambda name, device: Knows())
    monkeypatch.setattr(router_run, "contrastive_step", keep)
    train_routers(prepare_routers(settings(place, tmp_path, teacher="knows", steps=2, soft=0.3), notes()))
    assert lines(tmp_path)[1][-1]["others"]["teacher"] > 0.9  # six notes of a topic among nine
    for targets in seen:
        torch.testing.assert_close(targets.sum(1), torch.ones(len(targets)))
        assert float(targets.amax(1).min()) > 0.68 and ((targets > 0.01) & (targets < 0.5)).any()


def test_questions_of_a_model_are_asked_and_kept(place: Path, tmp_path: Path, monkeypatch) -> None:
    asks, end = tokenizer_of_notes(), 2

    def sample(model: Any, passages: torch.Tensor, tags: Any, stop: int) -> torch.Tensor:
        assert stop == end and len(tags) == 2
        said = torch.full((len(passages), 2, 6), end)
        said[:, 0, :3] = torch.tensor(asks("about w1x1 w1x2")["input_ids"])
        said[:, 1] = 5  # without an end
        return said

    monkeypatch.setattr("msa_hf.training.asked_questions.sample_questions", sample)
    drawn = []
    draw = PoolDrawer.draw
    monkeypatch.setattr(PoolDrawer, "draw", lambda self, *step: drawn.append(draw(self, *step)) or drawn[-1])
    prepared = prepare_routers(settings(place, tmp_path, ask=str(place / "base"), steps=2), notes())
    train_routers(prepared)
    kept = json.loads((tmp_path / ASKED_FILE).read_text())
    held_out = {item.gold[-1] for item in prepared.measured}
    assert set(map(int, kept)) == set(range(96)) - held_out and set(map(str, kept.values())) == {"['about w1x1 w1x2']"}
    queries = [query for pool in drawn for query in pool.queries]
    assert 0.2 < sum(query == "about w1x1 w1x2" for query in queries) / len(queries) < 0.8


@pytest.mark.parametrize(
    "options, message",
    [
        ({"full": True}, "--lora/--full: is of a run that trains by QUESTIONS; give QUESTIONS before OUT"),
        ({"batch_size": 4}, "--batch-size: is of a run that trains by QUESTIONS"),
        ({"pool": 1}, "--pool must be at least 2, got 1"),
        ({"held_out": 90}, "--held-out 90: of 96 passages at most 48"),
        ({"start": "warm"}, "argument --start: invalid choice"),
        ({"teacher": "nowhere/at/all"}, "nowhere/at/all"),
        ({"ask": "nowhere/at/all"}, "--ask nowhere/at/all"),
        ({"questions": "none.jsonl"}, "none.jsonl: No such file"),
        ({"max_length": 2}, "--max-length must be at least 8"),
        ({"seed": -1}, "--seed must be from 0 to 4294967295, got -1"),
        ({"seed": 10**30}, "--seed must be from 0 to 4294967295"),
        ({"soft": 0.2}, "--soft: is the share of a teacher in the labels; name one by --teacher"),
        ({"report_to": "wandb"}, "wandb"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(place, tmp_path, capsys, monkeypatch, options, message) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    assert main(command(place, tmp_path / "out", **options)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("msa-hf: error:")]
    assert len(said) == 1 and message in said[0]
    assert not (tmp_path / "out" / "config.json").exists()


FEW = dict(itertools.islice(notes().items(), 10))
DUPLICATES = {f"n{n}": "the same words in every single note . again and again" for n in range(30)}


@pytest.mark.parametrize(
    "texts, message",
    [
        ({}, "no documents"),
        (
            {"one": "w0x1 the only note"},
            "the documents have 1 different passages; routers learn to tell",
        ),
        (DUPLICATES, "the documents have 1 different passages, and 29 that repeat them; routers learn"),
        ({f"n{n}": f"w{n}x0" for n in range(16)}, "too short to make questions of"),
        ({"long": "x" * 100_000}, "the documents have 1 different passages"),
        ({f"n{n}": "x" * (n + 900) for n in range(16)}, "their words do not stand apart: of 16 passages"),
        (FEW | {f"x{n}": f"x{n}" * 90 for n in range(90)}, "--held-out 8: of 10 passages that can ask at most 5"),
    ],
    ids=["empty", "one", "duplicates", "words", "unbroken", "many unbroken", "few that ask"],
)
def test_folders_that_teach_nothing_are_refused(place, tmp_path, capsys, texts, message) -> None:
    documents = save_notes(tmp_path / "docs", texts)
    assert main(command(place, tmp_path / "out", documents, held_out=8)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert message in said and said.startswith("msa-hf: error:")


def test_passages_that_ask_nothing_leave_some_to_train_on(place: Path, tmp_path: Path) -> None:
    """A fifth of the few that ask is held out, where a fifth of all would be all of these."""
    documents = FEW | {f"x{n}": f"x{n}" * 90 for n in range(90)}
    prepared = prepare_routers(settings(place, tmp_path, held_out=None, steps=1), documents)
    assert len(prepared.measured) == 2
    assert train_routers(prepared).measurements[-1]["passages"] == 100


def test_passages_are_no_longer_than_the_model_has_positions(place: Path, tmp_path: Path) -> None:
    """Which is said; the first position of a document stands behind those of the context."""
    long = {f"long{n}": " ".join(text for text in notes(n).values()) for n in range(3)}
    prepared = prepare_routers(settings(place, tmp_path, max_length=5_000), long)
    assert prepared.notes[0] == "passages have at most 240 tokens, as the model has positions for no more"
    assert 200 < max(map(len, prepared.coder.documents(prepared.corpus, range(len(prepared.corpus))))) <= 240
    assert prepare_routers(settings(place, tmp_path, max_length=240), long).notes == []


def test_a_long_run_on_a_cpu_says_how_long_and_what_takes_less(place, tmp_path, monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(router_run, "seconds_per_token", lambda model, lengths: 1.0)
    train_routers(
        prepare_routers(settings(place, tmp_path, steps=40, pool=40, eval_every=20), notes()), say=said.append
    )
    estimate = next(line for line in said if line.startswith("about "))
    assert re.match(r"about \d+ h on this CPU: 40 steps of 40 texts, and 96 texts encoded every 20 steps", estimate)
    assert "with --steps 30 --pool 32" not in estimate  # it saves less than a half
    assert said.index(estimate) == 0


def test_a_handful_of_notes_is_enough(place, tmp_path, capsys) -> None:
    """Too few to whiten routers by, which is said; nothing to mine, no room for companions."""
    documents = save_notes(tmp_path / "docs", dict(list(notes().items())[:8]))
    options = {"steps": 3, "held-out": 1, "chunk-size": 64}
    assert main(command(place, tmp_path / "out", documents, **options)) == 0
    said = capsys.readouterr()
    assert "8 chunks are too few to whiten routers of 64 directions" in said.err and "router at first" in said.out
    assert lines(tmp_path / "out")[1][-1]["k"] == 1


def test_launchers_of_several_processes_are_refused(place, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start it without a launcher"):
        prepare_routers(settings(place, tmp_path), notes())


def test_undecodable_files_are_named(place, tmp_path, capsys) -> None:
    (save_notes(tmp_path / "docs") / "bad.txt").write_bytes(b"caf\xe9")
    assert main(command(place, tmp_path / "out", tmp_path / "docs")) == 2
    assert "bad.txt: not UTF-8 text (byte 0xe9 at 3)" in capsys.readouterr().err


def test_a_collapsed_run_ends(place, tmp_path) -> None:
    prepared = prepare_routers(settings(place, tmp_path, eval_every=1, learning_rate=1e4), notes())
    with pytest.raises(RuntimeError, match="collapsed"):
        train_routers(prepared, CollapseGuard(patience=1, distinct_share=1.0))
    assert not (tmp_path / "config.json").exists() and (tmp_path / CURVE_FILE).exists()


def test_scores_that_are_no_numbers_are_a_collapse(place, tmp_path, capsys) -> None:
    """Weights so large that hidden states overflow, while they are numbers themselves."""
    assert main(command(place, tmp_path, **{"learning-rate": 1e30, "steps": 20})) == 1
    assert "The run has collapsed at step 1: The router scores of layer 1 are NaN" in capsys.readouterr().err


def test_an_adapter_is_no_base(place, tmp_path, capsys) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(["train", str(tmp_path), str(place / "notes"), str(tmp_path / "out")]) == 2
    assert "an adapter of PEFT, whose base" in capsys.readouterr().err


def test_figures_go_to_what_trainer_reports_to(place, tmp_path, monkeypatch) -> None:
    told: list[tuple[str, Any]] = []

    class Told:
        def on_train_begin(self, arguments: Any, state: Any, control: Any, **what: Any) -> None:
            told.append(("begin", what["model"]))

        def on_log(self, arguments: Any, state: Any, control: Any, logs: Any = None, **what: Any) -> None:
            told.append((state.global_step, logs))

        def on_train_end(self, arguments: Any, state: Any, control: Any, **what: Any) -> None:
            told.append(("end", None))

    monkeypatch.setattr(
        "transformers.integrations.get_reporting_integration_callbacks",
        lambda names: [Told] if names == ["wandb"] else [],
    )
    train_routers(prepare_routers(settings(place, tmp_path, report_to="wandb"), notes()))
    assert told[0][0] == "begin" and told[-1][0] == "end"
    logged = [item for item in told if isinstance(item[0], int)]
    assert any("loss" in logs for _, logs in logged) and any("router_recall@9" in logs for _, logs in logged)
    assert all(isinstance(value, float) for _, logs in logged for value in logs.values())
    recalls = [(step, name) for step, logs in logged for name in logs if "recall" in name]
    assert len(set(recalls)) == len(recalls) - 1  # one figure a step under each name, but for what does not move
    assert {name for _, name in recalls} == {"untrained_recall@9", "router_recall@9", "bm25_recall@9"}


def test_help_names_both_kinds(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    assert re.search(r"MODEL\s+DOCUMENTS\s+\[QUESTIONS\]\s+OUT", said) and "without QUESTIONS" in said
