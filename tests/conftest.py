"""Settings of all tests."""

import gc
from collections.abc import Generator, Iterator

import pytest
import torch

from msa_hf.ops import BACKENDS, use_backend

# The models are tiny: a second thread costs them more than it gives, many times more where cores are shared.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, help="of a test with more cases, run so many that lie evenly apart")
    parser.addoption("--backend", choices=list(BACKENDS), help="run the native operations on this one, or fail")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect without a search for garbage, and have none of the later ones look at what was collected.

    The modules and the tests are a million objects that stay. A search through them takes half a second, and every
    forked process begins with one.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out cases of tests that have more than `--cases`, the same ones in every process."""
    if (most := config.getoption("--cases")) is None:
        return
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {
        cases[place * len(cases) // most if len(cases) > most else place]
        for cases in tests.values()
        for place in range(min(most, len(cases)))
    }
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


@pytest.fixture(scope="session", autouse=True)
def backend_of_this_run(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_backend(request.config.getoption("--backend")):
        yield
