"""What a renamed argument of transformers would break: the cache that goes from step to step, and the documents in it.

No test here relies on a warning: each compares answers, so that a version which hands something over under another name
fails it. All run once more in a process whose transformers has lost its deprecated names (`without_old_names.py`).
"""

import ast
import logging
import os
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from setups import FEW, Setup, assert_same, batch_of, build, samples_of, setup, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import msa_hf
from msa_hf import MSACache, MSAForCausalLM
from msa_hf.model import compat_msa
from msa_hf.model.compat_msa import CACHE, CACHE_NAMES, NEWEST_TESTED, cache_of

ROOT = Path(__file__).parents[2]
QUESTIONS = tokens(9, 2, 5, seed=12)
STEPS = 6
EXACTLY = {"min_new_tokens": STEPS, "max_new_tokens": STEPS, "do_sample": False}

few = pytest.mark.parametrize("family, attention", FEW)
names = pytest.mark.parametrize("name", CACHE_NAMES)


class RoutingCounter:
    """How many tokens the router of the first memory layer saw in each of its runs."""

    def __init__(self, model: Any) -> None:
        self.tokens: list[int] = []
        layer = next(module for module in model.modules() if hasattr(module, "router_q_proj"))
        layer.router_q_proj.register_forward_hook(lambda module, inputs, output: self.tokens.append(inputs[0].shape[1]))


def continuations(made: Setup, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """[B, STEPS] the tokens generated behind a batch of prompts."""
    return made.model.generate(**batch, **{"memory": made.bank, **EXACTLY, **options})[:, -STEPS:]


# What must be right on every version ----------------------------------------------------------------------------------


@few
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_only_the_prompt_routes(family, attention, options) -> None:
    """Of all forwards of a generation, the first routes, with the prompt's tokens; none of the others does."""
    made = setup(family, attention)
    counter = RoutingCounter(made.model)
    continuations(made, batch_of(QUESTIONS[:1]), **options)
    assert counter.tokens == [len(QUESTIONS[0])]


@few
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_beams": 1}], ids=str)
def test_cached_equals_uncached(family, attention, options) -> None:
    """The same tokens with a cache and by recomputing all of them at every step."""
    made, found = setup(family, attention), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(continuations(made, batch_of(QUESTIONS), use_cache=use_cache, **options))
    assert torch.equal(*found)


@few
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_padded_equals_alone(family, attention, options) -> None:
    """Each question of a left-padded batch is answered as if it were alone."""
    made = setup(family, attention)
    together = continuations(made, batch_of(QUESTIONS), **options)
    for question, row in zip(QUESTIONS, together, strict=True):
        assert torch.equal(continuations(made, batch_of([question]), **options)[0], row)


@names
@few
def test_the_second_turn_keeps_its_documents(family, attention, name) -> None:
    """A turn without routing tokens attends to the documents of the first, by either name of the cache."""
    made, new = setup(family, attention), torch.tensor([[17, 3, 99]])
    first = batch_of(QUESTIONS[:1])
    whole = made.model.generate(**first, memory=made.bank, return_dict_in_generate=True, **EXACTLY)
    cache = cache_of(whole)
    assert isinstance(cache, MSACache) and set(made.model.config.memory_layers) <= cache.contexts.keys()
    chosen = {layer: cache.contexts[layer].documents.tolist() for layer in made.model.config.memory_layers}
    history = torch.cat([whole.sequences, new], 1)
    counter = RoutingCounter(made.model)
    options = {**EXACTLY, "return_dict_in_generate": True, "output_logits": True}
    second = made.model.generate(history, attention_mask=torch.ones_like(history), **{name: cache}, **options)
    assert not counter.tokens
    kept = cache_of(second).contexts
    assert {layer: kept[layer].documents.tolist() for layer in chosen} == chosen
    # The same by recomputing everything, where only the first turn's tokens route.
    inputs, routes = second.sequences[:, :-1], torch.zeros(1, second.sequences.shape[1] - 1, dtype=torch.bool)
    routes[:, : len(QUESTIONS[0])] = True
    with torch.no_grad():
        logits = made.model(inputs, memory=made.bank, routing_mask=routes, use_cache=False).logits
    assert_same(second.logits[-1], logits[:, -1])


@names
@few
def test_forward_takes_the_cache_by_either_name(family, attention, name) -> None:
    """Steps of forward over a cache, with a memory and without one, equal one forward over all tokens."""
    made, batch = setup(family, attention), batch_of(QUESTIONS[:1])
    ids = batch["input_ids"]
    for memory, cache in ((made.bank, MSACache(config=made.model.config)), (None, None)):
        routes = {} if memory is None else {"routing_mask": torch.ones(1, ids.shape[1] - 1, dtype=torch.bool)}
        with torch.no_grad():
            first = made.model(ids[:, :-1], memory=memory, use_cache=True, **routes, **{name: cache})
            held = cache_of(first)
            assert cache is None or held is cache
            step = made.model(ids[:, -1:], attention_mask=torch.ones_like(ids), **{name: held})
            routes = {key: torch.nn.functional.pad(mask, (0, 1)) for key, mask in routes.items()}
            whole = made.model(ids, memory=memory, use_cache=False, **routes)
        assert_same(step.logits[:, -1], whole.logits[:, -1])
        if memory is not None:
            assert first.cache is held and first.past_key_values is held


def test_a_decoding_function_gets_the_cache_by_this_version_s_name() -> None:
    """`custom_generate` sees one cache, the one that was passed, under the name that its transformers uses."""
    made, seen = setup(), {}

    def greedy(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        seen.update({name: kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None})
        return input_ids

    for name in CACHE_NAMES:
        seen.clear()
        cache = MSACache(config=made.model.config)
        made.model.generate(**batch_of(QUESTIONS[:1]), memory=made.bank, custom_generate=greedy, **{name: cache})
        assert list(seen) == [CACHE] and seen[CACHE] is cache


def test_a_training_step_takes_no_cache_by_any_name() -> None:
    made = setup()
    for name in CACHE_NAMES:
        with pytest.raises(ValueError, match="takes no cache"):
            made.model(torch.tensor([[5, 6]]), documents=[[3, 4]], **{name: DynamicCache(config=made.model.config)})


def test_two_caches_are_refused() -> None:
    made, cache = setup(), MSACache(config=setup().model.config)
    both = {"cache": cache, "past_key_values": MSACache(config=made.model.config)}
    ids = torch.tensor([[5, 6]])
    for call in (made.model, made.model.generate):
        with pytest.raises(ValueError, match="two names of one argument"):
            call(ids, memory=made.bank, **both)
    assert compat_msa.rename_cache({"cache": cache, "past_key_values": cache}) is cache
    assert compat_msa.rename_cache({"cache": None, "past_key_values": cache}) is cache


# A version that nobody has seen yet -----------------------------------------------------------------------------------


def drop_before_the_step(monkeypatch: pytest.MonkeyPatch, base: type) -> None:
    """A transformers that hands the cache to forward by a name that we do not know."""
    prepare = base.prepare_inputs_for_generation

    def renamed(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = prepare(self, *args, **kwargs)
        inputs.pop(CACHE, None)
        return inputs

    monkeypatch.setattr(base, "prepare_inputs_for_generation", renamed)


def drop_behind_the_step(monkeypatch: pytest.MonkeyPatch, base: type) -> None:
    """A transformers that keeps what forward returned by a name that we do not know."""
    update = base._update_model_kwargs_for_generation

    def renamed(self: Any, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        kept = update(self, outputs, model_kwargs, *args, **kwargs)
        return {"memory_of_keys" if name == CACHE else name: value for name, value in kept.items()}

    monkeypatch.setattr(base, "_update_model_kwargs_for_generation", renamed)


@pytest.mark.parametrize("lose", [drop_before_the_step, drop_behind_the_step])
@pytest.mark.parametrize("questions", [1, 3])
def test_a_lost_cache_raises(monkeypatch, lose, questions) -> None:
    """Where the cache does not come back, generate() raises instead of answering from documents routed anew."""
    made = setup()
    lose(monkeypatch, type(made.model).base_class)
    with pytest.raises((RuntimeError, ValueError), match=r"did not hand the cache|but 1 have been seen"):
        continuations(made, batch_of(QUESTIONS[:questions]))


@pytest.mark.parametrize("version, told", [("5.17.0", 0), (f"{NEWEST_TESTED}.9", 0), ("5.99.0.dev0", 1), ("6.0.0", 1)])
def test_an_untested_version_is_named_once(monkeypatch, caplog, version, told) -> None:
    """One line where transformers is newer than the newest tested, however many models are made."""
    monkeypatch.setattr(compat_msa.transformers, "__version__", version)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    compat_msa.logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING, compat_msa.logger.name):
        build()
        build()
    lines = [record.getMessage() for record in caplog.records if version in record.getMessage()]
    assert len(lines) == told and all("\n" not in line and NEWEST_TESTED in line for line in lines)


def test_the_package_allows_what_was_tested() -> None:
    """The upper bound of the package's requirement is the newest tested release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bound = next(line for line in project["dependencies"] if line.startswith("transformers"))
    major, minor = map(int, NEWEST_TESTED.split("."))
    assert bound.endswith(f",<{major}.{minor + 1}")


# Deprecated names -----------------------------------------------------------------------------------------------------


def test_our_code_uses_no_deprecated_names() -> None:
    """Only the file of differences knows the old name of an argument that was renamed, as a name or in a string."""
    found = []
    for path in sorted(Path(msa_hf.__file__).parent.rglob("*.py")):
        text = path.read_text()
        if path.name == "compat_msa.py" or not re.search("torch_dtype|past_key_values|cache_params", text):
            continue
        for node in ast.walk(ast.parse(text)):
            words = [getattr(node, field, None) for field in ("arg", "attr", "id", "name", "value")]
            passed = isinstance(node, ast.keyword) and node.arg == "torch_dtype"
            if passed or any(word in ("past_key_values", "cache_params") for word in words if isinstance(word, str)):
                found.append(f"{path.name}:{getattr(node, 'lineno', '?')}")
    assert not found


def test_nothing_warns(caplog, monkeypatch) -> None:
    """Encoding, asking, generating, turns, beams and a training step: no deprecation, from whomever."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings(record=True) as raised, caplog.at_level(logging.WARNING, "transformers"):
        warnings.simplefilter("always")
        made = build()
        for options in ({}, {"num_beams": 2}, {"use_cache": False}, {"return_dict_in_generate": True}):
            found = made.model.generate(**batch_of(QUESTIONS), memory=made.bank, **EXACTLY, **options)
        history = torch.nn.functional.pad(found.sequences, (0, 2), value=9)
        made.model.generate(history, attention_mask=torch.ones_like(history), cache=cache_of(found), **EXACTLY)
        ids = torch.tensor([[5, 6, 7]])
        made.model(ids, documents=[[3, 4], [8, 9]], labels=ids.masked_fill(ids == 5, -100)).loss.backward()
    texts = [f"{item.category.__name__} {item.message}" for item in raised] + [
        item.getMessage() for item in caplog.records
    ]
    assert not [text for text in texts if re.search(r"deprecat|FutureWarning|removed in", text, re.IGNORECASE)]


@pytest.mark.skipif("without_old_names" in sys.modules, reason="this is the run without them")
@pytest.mark.skipif(CACHE != "cache", reason="this transformers has no deprecated names yet")
def test_all_of_this_without_the_old_names() -> None:
    """These tests pass where transformers takes no deprecated name any more, as after 5.40."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "without_old_names"]
    path = os.pathsep.join([str(ROOT / "tests" / "helpers"), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [
            *command,
            str(Path(__file__)),
            "-k",
            "not every_version and not untested and not allows and not our_code and not gpt_oss and not gemma2",
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


# Checkpoints travel ---------------------------------------------------------------------------------------------------

ELSEWHERE = """
import sys
sys.modules["msa_hf"] = None  # what cannot be imported is not installed
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM, DynamicCache
modules = set()
for directory in map(Path, sys.argv[1:]):
    print(directory.name, flush=True)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    modules.add(type(model).__module__)
    assert type(model).__module__.startswith("transformers_modules")
    expected = torch.load(directory / "expected.pt", weights_only=True)
    bank = model.load_memory(directory / "bank")
    for name in ("cache", "past_key_values"):
        found = model.generate(expected["prompt"], attention_mask=expected["mask"], memory=bank, max_new_tokens=6,
                               min_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
        assert torch.equal(found.sequences, expected["sequences"]), (found.sequences, expected["sequences"])
        torch.testing.assert_close(found.logits[-1], expected["logits"], atol=1e-4, rtol=1e-4)
        cache = found.get("cache") if "cache" in found.keys() else found.past_key_values
        history = torch.nn.functional.pad(found.sequences, (0, 1), value=9)
        again = model.generate(history, attention_mask=torch.ones_like(history), max_new_tokens=2, do_sample=False,
                               **{name: cache})
        assert torch.equal(again, expected["again"]), (again, expected["again"])
assert len(modules) == len(sys.argv) - 1, "each checkpoint runs code of its own"
"""


def write_checkpoint(directory: Path) -> None:
    """A checkpoint with its code, a bank of it, and what it generates here."""
    made = setup("qwen3", "sdpa")
    made.model.save_pretrained(directory)
    made.bank.save_pretrained(directory / "bank")
    batch = batch_of(QUESTIONS)
    options = {"return_dict_in_generate": True, "output_logits": True}
    found = made.model.generate(**batch, memory=made.bank, **EXACTLY, **options)
    history = torch.nn.functional.pad(found.sequences, (0, 1), value=9)
    again = made.model.generate(
        history, attention_mask=torch.ones_like(history), cache=cache_of(found), max_new_tokens=2, do_sample=False
    )
    expected = {"prompt": batch["input_ids"], "mask": batch["attention_mask"], "sequences": found.sequences}
    torch.save({**expected, "logits": found.logits[-1], "again": again}, directory / "expected.pt")


def test_checkpoints_of_every_version(tmp_path: Path) -> None:
    """A checkpoint's own code, with a bank, answers alike under this version and those of other environments.

    `.ci/run` names a directory in which the environments of several versions find each other's checkpoints.
    """
    meeting = Path(os.environ.get("MSA_HF_CHECKPOINTS", tmp_path))
    own = meeting / f"transformers-{transformers.__version__}"
    if not own.exists():
        own.mkdir(parents=True)
        write_checkpoint(own)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    directories = sorted(meeting.glob("transformers-*"))
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, directories)], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, f"{run.stdout[-300:]}: {run.stderr[-3000:]}"
    for directory in directories:
        loaded = MSAForCausalLM.from_pretrained(directory)
        assert isinstance(AutoModelForCausalLM.from_pretrained(directory), MSAForCausalLM)
        expected = torch.load(directory / "expected.pt", weights_only=True)
        bank = loaded.load_memory(directory / "bank")
        found = loaded.generate(expected["prompt"], attention_mask=expected["mask"], memory=bank, **EXACTLY)
        assert torch.equal(found, expected["sequences"])


def test_samples_differ() -> None:
    """The comparisons above would see a wrong answer: the questions, and having a memory or not, matter."""
    made, batch = setup(), batch_of(QUESTIONS)
    assert len({tuple(row) for row in continuations(made, batch).tolist()}) > 1
    with torch.no_grad():
        routed = samples_of(made.model(**batch, memory=made.bank).logits, batch)
        plain = samples_of(made.model(**batch).logits, batch)
    assert all(not torch.allclose(ours, theirs, atol=1e-3) for ours, theirs in zip(routed, plain, strict=True))
