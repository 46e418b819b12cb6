"""Make the API reference of docstrings: one HTML page for every module, with a search.

    python tools/make_reference.py build/reference              # all of it
    python tools/make_reference.py build/reference msa_hf.bank  # a package or module, to look at

Needs pdoc (`pip install "msa-hf[docs]"`). What a package exports stands on the package's page; a class that travels
with checkpoints, such as `MSAForCausalLM`, has its methods on the pages of `msa_hf.model`.
"""

from __future__ import annotations

import argparse
import pkgutil
import sys
import warnings
from pathlib import Path

import pdoc

import msa_hf

# The table of old names; and what only imports where it runs: the extension and Triton's kernels.
LEFT_OUT = ("moved", "_C", "triton")


def is_documented(name: str) -> bool:
    return not name.rpartition(".")[2].startswith(LEFT_OUT)


def all_modules() -> list[str]:
    """Every module of the package, the package itself first."""
    found = (module.name for module in pkgutil.walk_packages(msa_hf.__path__, "msa_hf."))
    return ["msa_hf", *filter(is_documented, found)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="the directory to write to")
    parser.add_argument("modules", nargs="*", help="default: all")
    options = parser.parse_args(arguments)
    pdoc.render.configure(docformat="google", show_source=False, footer_text=f"msa-hf {msa_hf.__version__}")
    with warnings.catch_warnings():
        # A package without `__all__` brings its modules along, which are named here as well.
        warnings.filterwarnings("ignore", message="The module specification")
        pdoc.pdoc(*(options.modules or all_modules()), output_directory=options.out)
    print(f"{options.out / 'index.html'}: {sum(1 for _ in options.out.rglob('*.html'))} pages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
