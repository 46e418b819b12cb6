"""Help and mistakes come at once, an interruption is one line, and `import msa_hf` registers all the same."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from msa_hf.bench.facts import run_facts

HEAVY = ("torch", "transformers", "numpy", "pyarrow")
LIGHT = [
    ["--help"],
    ["--version"],
    ["--no-such-option"],
    ["ask", "--help"],
    ["ask", "--no-such-option"],
    ["eval", "--help"],
    ["encode", "--help"],
    ["train", "--help"],
    ["bank", "add", "--help"],
    ["chain", "--help"],
]


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_nothing_heavy_is_loaded_before_a_command_runs() -> None:
    code = f"""
import sys
from msa_hf.cli import main
for arguments in {LIGHT}:
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    assert code == (2 if "--no-such-option" in arguments else 0), arguments
    assert not [name for name in {HEAVY} if name in sys.modules], arguments
"""
    found = python(code)
    assert found.returncode == 0, found.stderr
    assert (
        f"msa-hf {__import__('msa_hf').__version__}" in found.stdout and "{generate,constrained,router" in found.stdout
    )


@pytest.mark.parametrize("arguments", [["--help"], ["ask", "--help"]], ids=" ".join)
def test_help_comes_at_once(arguments: list[str]) -> None:
    """In 0.1 s on a machine with nothing else to do; importing torch alone takes more than the bound."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        assert python("from msa_hf.cli import main; main()", *arguments).returncode == 0
        taken.append(time.perf_counter() - start)
        if taken[-1] < 0.5:
            return
    assert min(taken) < 1.5


@pytest.mark.parametrize("module", ["torch.nn", "transformers"])
def test_an_interruption_of_an_import_is_one_line(module: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")  # what is there is looked for before anything is imported
    (tmp_path / "config.json").write_text("{}")
    code = f"""
import os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # which whoever runs this in the background has ignored

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

from msa_hf.cli import main
sys.meta_path.insert(0, Interrupt())
sys.exit(main(["ask", {str(tmp_path)!r}, {str(tmp_path)!r}, "question"]))
"""
    found = python(code)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "\n")


def test_auto_classes_know_the_model_once_the_package_is_imported() -> None:
    """Whatever is imported first; each case in a process of its own, forked behind the slow import of torch."""
    code = """
import os, sys, torch
KNOWN = "from transformers import AutoConfig, AutoModelForCausalLM, AutoModel\\n" + '''
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
config = AutoConfig.for_model("msa", base_model_type="qwen3", num_hidden_layers=2)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
assert MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__ == "msa_hf.model.modeling_msa"
assert type(config) in MODEL_MAPPING and type(config) in TOKENIZER_MAPPING
import msa_hf
assert type(config) is msa_hf.MSAConfig and msa_hf.ops.adapters
assert not [item for item in sys.meta_path if type(item).__module__ == "msa_hf.registration"]
'''
CASES = [
    "from transformers import AutoModelForCausalLM; import msa_hf",
    "from msa_hf.generation.interleave import MemoryInterleave",
]
for case in CASES:
    child = os.fork()
    if not child:
        try:
            exec(case + "\\n" + KNOWN)
            os._exit(0)
        except BaseException as error:
            print(case, type(error), error, file=sys.stderr, flush=True)
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, case
"""
    found = python(code)
    assert found.returncode == 0, found.stderr


def test_the_package_is_a_command() -> None:
    found = subprocess.run([sys.executable, "-m", "msa_hf", "--version"], capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.startswith("msa-hf ") and not found.stderr


@pytest.mark.parametrize("name", ["/bin/msa-hf", "/package/msa_hf/__main__.py"])
def test_results_name_the_command_that_a_user_types(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, "bench", "needles", "a model"])
    assert run_facts(torch.device("cpu"))["command"] == "msa-hf bench needles 'a model'"
