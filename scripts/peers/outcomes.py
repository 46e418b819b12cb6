"""A pytest plugin: what came of every test of a suite, as JSON, by the class that names family and form."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

PASSED = "passed"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, required=True, help="the file to write")


class Outcomes:
    """Class of a suite (without `Test`) -> test -> `passed`, or the last line of what it raised; no skipped tests."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, str]] = defaultdict(dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        parts = report.nodeid.split("::")
        tests = self.found[parts[1].removeprefix("Test")] if len(parts) > 2 else {}
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = crash.message if crash is not None else str(report.longrepr)
            tests[parts[-1]] = " ".join(message.split())[:600] or "failed"
        elif report.when == "call" and report.passed:
            tests.setdefault(parts[-1], PASSED)

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps(self.found, indent=1))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcomes(config.getoption("--outcomes")), "outcomes of tests")
