"""The equivalence certificate on one rank: `shardrun certify`'s cases under each strategy in fp32, against one process
without any framework on the CPU. Every strategy runs in a process of its own."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.alone import in_a_process, launch_alone, strategies_here
from benchmarks.gpu.results import asked
from shardrun.certify.equivalence import Case, Trace, certificate_cases, compare, run_reference, run_strategy
from strategies import select


def main() -> None:
    arguments = asked()
    result = arguments.result
    cases = [Case(steps=3, accumulation=3)] if arguments.tiny else certificate_cases(20)
    wrong = []
    folder = str(result.work())
    references = str(Path(folder) / "references.pt")
    in_a_process(refer, cases, references)
    for strategy in strategies_here(result):
        try:
            verdicts = in_a_process(judge, strategy, cases, references, arguments.tiny)
        except RuntimeError as error:
            wrong.append(strategy)
            result.note(f"{strategy} failed: {str(error).splitlines()[-1]}")
            print(error, flush=True)
            continue
        for case, verdict in zip(cases, verdicts, strict=True):
            result.row(
                f"Furthest from the reference over {case.steps} steps",
                strategy=strategy,
                optimizer=case.optimizer,
                **{"micro-batches": case.accumulation, "head": "tied" if case.tied else "untied", **verdict},
            )
            if not verdict["equal"]:
                wrong.append(strategy)
    if wrong:
        raise SystemExit(f"not equal or failed: {', '.join(dict.fromkeys(wrong))}")


def refer(cases: list[Case], file: str) -> None:
    """Train the references and leave them in a file."""
    torch.save([vars(run_reference(case)) for case in cases], file)


def judge(strategy: str, cases: list[Case], file: str, cpu: bool) -> list[dict[str, Any]]:
    """Train the cases under a strategy and compare each with its reference."""
    launch = launch_alone(strategy, cpu, "fp32")
    verdicts = []
    for case, reference in zip(cases, torch.load(file, weights_only=True), strict=True):
        trace = run_strategy(case, select.start(launch), 0, 1)
        verdict = compare(trace, Trace(**reference))
        verdicts.append({"loss": verdict.loss, "norm": verdict.norm, "weights": verdict.weight, "equal": verdict.equal})
    return verdicts


if __name__ == "__main__":
    main()
