"""Print what fails on ours and not on the base, and leave with 1 if no exception gives the reason.

python compare.py SUITE outcomes.json
"""

import fnmatch
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from outcomes import PASSED

EXCEPTIONS = Path(__file__).with_name("exceptions.toml")


def kind_of(test: str) -> str:
    """The test without the directory of a model, so that the forms' names are equal."""
    return re.sub(r"/[^\s\]]*/(plain|generic|made|memory)/", "", test)


def exception_of(suite: str, form: str, test: str, message: str, exceptions: list[dict[str, Any]]) -> int | None:
    """The place of the first exception that names this failure."""
    for place, item in enumerate(exceptions):
        named = item["suite"] == suite and form in item["forms"]
        if named and fnmatch.fnmatchcase(test.partition("[")[0], item["test"]) and re.search(item["message"], message):
            return place
    return None


def main(suite: str, path: str) -> int:
    found: dict[str, dict[str, str]] = json.loads(Path(path).read_text())
    exceptions = tomllib.loads(EXCEPTIONS.read_text())["exception"]
    unexplained, used = [], [0] * len(exceptions)
    for name, tests in sorted(found.items()):
        family, _, form = name.rpartition("_")
        failed = {kind_of(test): message for test, message in tests.items() if message != PASSED}
        plain = {kind_of(test) for test, message in found.get(f"{family}_plain", {}).items() if message != PASSED}
        ours = {test: message for test, message in failed.items() if test not in plain}
        print(f"{family:7} {form:8} {len(tests):5} ran, {len(failed):4} failed, {len(ours):4} of them on ours alone")
        if form == "plain":
            continue
        for test, message in ours.items():
            place = exception_of(suite, form, test, message, exceptions)
            if place is None:
                unexplained.append(f"{family} {form} {test}: {message}")
            else:
                used[place] += 1
    for item, times in zip(exceptions, used, strict=True):
        if item["suite"] == suite:
            print(f"exception, {times} times: {item['test']} ({', '.join(item['forms'])}): {item['reason']}")
    print(f"without a reason: {len(unexplained)}")
    print("\n".join(unexplained))
    return bool(unexplained)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
