"""Settings of all tests."""

from collections.abc import Iterator

import pytest
import torch

from msa_hf.ops import BACKENDS, use_backend

# The models are tiny: a second thread costs them more than it gives, many times more where cores are shared.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=list(BACKENDS), help="run the native operations on this one, or fail")


@pytest.fixture(scope="session", autouse=True)
def backend_of_this_run(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_backend(request.config.getoption("--backend")):
        yield
