"""Parts for the tests of benchmarks/gpu that behave as they are told: python -m tests.benchmarks.parts RESULT WHAT."""

import subprocess
import sys
import time

from benchmarks.gpu.parts import Part
from benchmarks.gpu.results import asked

MACHINE = {"card": "Test Card", "torch": "2.13", "rate of copies (TB/s)": 2.5}


def part(name: str, *packages: str) -> Part:
    return Part(name, f"The part {name}", "tests.benchmarks.parts", 30, packages, (name,))


def main() -> None:
    arguments = asked()
    what = arguments.what[0]
    arguments.result.row("Seen", what=what, tiny="yes" if arguments.tiny else "no")
    print(f"this is {what}", flush=True)
    if what == "hang":
        sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
        process = subprocess.Popen(sleeper, start_new_session=True)  # as a launcher does with its ranks
        arguments.result.note(str(process.pid))
        time.sleep(600)
    if what == "fail":
        raise SystemExit("it is broken")


if __name__ == "__main__":
    main()
