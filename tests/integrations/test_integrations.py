"""The adapters without the libraries that they adapt to."""

import subprocess
import sys

import pytest

WITHOUT = """
import sys
for name in ("langchain_core", "llama_index", "llama_index.core"):
    sys.modules[name] = None
import msa_hf.integrations
assert "torch" not in sys.modules
for name in msa_hf.integrations.__all__:
    try:
        getattr(msa_hf.integrations, name)
    except ImportError as error:
        print(error)
"""


def test_what_is_missing_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    langchain = "LangChain is not installed: `pip install 'msa-hf[langchain]'`."
    llamaindex = "LlamaIndex is not installed: `pip install 'msa-hf[llamaindex]'`."
    assert done.stdout.splitlines() == [langchain, langchain, llamaindex]


def test_what_is_not_there_is_no_attribute() -> None:
    import msa_hf.integrations

    with pytest.raises(AttributeError):
        _ = msa_hf.integrations.HaystackRetriever
