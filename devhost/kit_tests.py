"""pytest, with each outcome written down as it comes: a run that is stopped or killed still tells what it found.

    python kit_tests.py OUTCOMES [pytest's own options]

OUTCOMES: a file that gets a line of JSON, [test, "passed" | "failed" | "skipped"], for each test that has ended.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


class Outcomes:
    """A plugin of pytest; under pytest-xdist of the process that shares out the tests."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([report.nodeid, report.outcome]) + "\n")


if __name__ == "__main__":
    import pytest

    sys.exit(pytest.main(sys.argv[2:], plugins=[Outcomes(Path(sys.argv[1]))]))
