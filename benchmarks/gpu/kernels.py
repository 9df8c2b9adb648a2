"""The kernels beside what they would have to beat: the table of benchmarks/kernels.py. At tiny sizes interpreted."""

import sys

import torch

from benchmarks.gpu.results import asked
from benchmarks.kernels import CASES, WRONG, fp8_cases, row


def main() -> None:
    arguments = asked()
    result = arguments.result
    gpu = "" if arguments.tiny else torch.cuda.get_device_name()
    failed = []
    for make in CASES:
        if arguments.tiny and make is fp8_cases:
            result.note("FP8: left out, since the interpreter's 8-bit numbers are not the hardware's.")
            continue
        name, cases = make.__name__.replace("_", " "), []
        try:
            cases = make()
            for case in cases:
                name = case.name
                cells = row(case, gpu)
                result.row("Kernels", **cells)
                if any(cell.startswith(WRONG) for cell in cells.values()):
                    failed.append(name)
        except Exception as error:  # whatever it is, of Triton or of torch: the next kernels can be timed
            failed.append(name)
            result.note(f"{name} failed: {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")
        del cases
        if not arguments.tiny:
            torch.cuda.empty_cache()
    if failed:
        sys.exit(f"wrong or failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
