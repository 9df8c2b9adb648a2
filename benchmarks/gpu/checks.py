"""tests/kernels/checks on the card: every kernel against float64. At tiny sizes two of them, interpreted."""

import sys
from pathlib import Path

import pytest

from benchmarks.gpu.results import Result, asked

CHECKS = Path(__file__).parents[2] / "tests" / "kernels" / "checks"


class Watch:
    """What pytest tells: passed and failed checks, written as they come."""

    def __init__(self, result: Result):
        self.result = result
        self.passed: dict[str, int] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = Path(report.nodeid.partition("::")[0]).stem
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = crash.message if crash else report.longreprtext
            self.result.row("Checks that failed", check=f"{file}.py::{report.nodeid.partition('::')[2]}", why=why[:300])
        elif report.when == "call":
            self.passed[file] = self.passed.get(file, 0) + 1
            rows = [{"checks of": name, "passed": count} for name, count in self.passed.items()]
            self.result.table("Checks that passed", rows)


def main() -> None:
    arguments = asked()
    files = sorted(CHECKS.glob("[a-z]*.py"))
    if arguments.tiny:
        files = [CHECKS / "relu2.py"]
    watch = Watch(arguments.result)
    # Neither the project's settings nor its fixtures: they ask for plugins that a card's machine need not have.
    settings = ["-c", "/dev/null", "--rootdir", str(CHECKS.parents[2]), "--noconftest", "-p", "no:cacheprovider"]
    few = ["-k", "any_strides"] if arguments.tiny else []
    status = pytest.main([*settings, *few, "-v", "--tb=line", *map(str, files)], plugins=[watch])
    if not watch.passed:
        sys.exit("no check passed")
    sys.exit(int(status))


if __name__ == "__main__":
    main()
