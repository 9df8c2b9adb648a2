"""The kernels beside what they would have to beat: the table of benchmarks/kernels.py. At tiny sizes interpreted."""

import torch

from benchmarks.gpu.results import asked
from benchmarks.kernels import CASES, fp8_cases, row


def main() -> None:
    arguments = asked()
    gpu = "" if arguments.tiny else torch.cuda.get_device_name()
    for make in CASES:
        if arguments.tiny and make is fp8_cases:
            arguments.result.note("FP8: left out, since the interpreter's 8-bit numbers are not the hardware's.")
            continue
        try:
            cases = make()
        except RuntimeError as error:  # of memory, of a compiler
            arguments.result.note(f"{make.__name__} failed: {str(error).splitlines()[0][:200]}")
            continue
        for case in cases:
            try:
                arguments.result.row("Kernels", **row(case, gpu))
            except RuntimeError as error:
                arguments.result.note(f"{case.name} failed: {str(error).splitlines()[0][:200]}")
        del cases
        if not arguments.tiny:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
