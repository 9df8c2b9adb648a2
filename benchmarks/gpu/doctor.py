"""`shardrun doctor` on this machine: it also launches every strategy through accelerate. At tiny sizes --quick."""

import sys

from benchmarks.gpu.results import Result, asked
from shardrun.doctor import examine
from shardrun.doctor.report import Finding, Report

TIMEOUT = 60.0
"""Seconds after which one of its checks hangs."""


class Kept(Report):
    """A report that is also kept as a table, as it comes."""

    def __init__(self, result: Result):
        super().__init__()
        self.result = result

    def add(self, line: Finding) -> None:
        super().add(line)
        section, line = self.lines[-1]
        self.result.row("Finds", section=section, name=line.name, status=line.status, said=line.said, fix=line.fix)


def main() -> None:
    arguments = asked()
    report = Kept(arguments.result)
    examine(report, quick=arguments.tiny, timeout=TIMEOUT)
    arguments.result.note(report.verdict())
    sys.exit(1 if report.count("failure") else 0)


if __name__ == "__main__":
    main()
