"""`shardrun certify`: the equivalence certificate.

Trains a small model for twenty steps in one process without any framework, then under each accelerate config, and
compares every step's loss and gradient norm and every final weight. In fp32, whatever the config says: the question is
whether the mathematics is the same, and rounding to 16 bits would hide the answer. Where two runs part, it says where.
With --precision the strategies compute in bf16 or fp16, beside the same float32 run, and tolerances are wider: that
shows that nothing is grossly wrong, such as a gradient that nobody unscaled, and not that the mathematics is the same.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from shardrun.configs import resolve_config
from shardrun.launch import find_config, launch, what_went_wrong
from shardrun.output import write_whole
from speedrun.ranges import check_ranges
from strategies import catalogue, strict_json
from strategies.config_file import Asked
from strategies.errors import UserError

if TYPE_CHECKING:
    from strategies.base import Precision

if TYPE_CHECKING:
    from strategies.base import Precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="an accelerate config, your own too; may be repeated (default: the shipped cpu/ configs)",
    )
    parser.add_argument("--processes", type=int, help="override the config's number of processes")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="that the strategies compute in, with its own tolerances; the reference is fp32 (default: fp32)",
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: 20)")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="print the certificate as JSON instead of the table, or also write it to this file",
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.json and not Path(arguments.json).parent.is_dir():  # before minutes of training, not after
        raise UserError(f"There is no folder {str(Path(arguments.json).parent)!r} for the certificate: make it first.")
    if arguments.json != "-":
        certificate = _certify(arguments)
        if arguments.json:
            write_whole(Path(arguments.json), certificate)
    else:
        with contextlib.redirect_stdout(sys.stderr):  # what it does meanwhile
            certificate = _certify(arguments)
        print(certificate, end="")
    return 0 if all(row["equal"] for row in json.loads(certificate)["cases"]) else 1


def _certify(arguments: argparse.Namespace) -> str:
    """Train, print the table, return the certificate as JSON. Raises ValueError for what cannot be certified."""
    from shardrun.certify.equivalence import TOLERANCES, certificate_cases, compare, run_reference

    precision, allowed = arguments.precision, TOLERANCES[arguments.precision]
    if arguments.steps < 1 or (arguments.processes is not None and arguments.processes < 1):
        raise UserError("--steps and --processes are at least 1.")
    configs = [find_config(name) for name in arguments.config or [f"cpu/{name}" for name in catalogue.spread()]]
    for config in configs:  # before minutes of training, not after
        _check(resolve_config(config, mixed_precision=_mixed(arguments.precision)), arguments.processes)
    cases = certificate_cases(arguments.steps)
    check_ranges(dataclasses.replace(cases[0].config(), steps=arguments.steps))
    print(f"Reference: one process, no framework, {arguments.steps} steps, {len(cases)} cases")
    references = [run_reference(case) for case in cases]
    if precision == "fp32":
        print(
            f"Equal means: every loss and gradient norm within {allowed.loss:.2g} relative, every final weight within"
        )
    else:
        print(f"Equal, but for rounding, means: every loss within {allowed.loss:.2g} relative, every gradient norm")
        print(f"within {allowed.norm:.2g}, every final weight within")
    print(f"{allowed.weight:.2g} absolute, in {precision}, gradients clipped at every step.\n")
    header = f"{'config':<16}{'ranks':>6}  {'optimizer':<10}{'micro-batches':>14}  {'head':<9}{'loss':>9}{'norm':>9}"
    print(header + f"{'weights':>9}  equal")

    certificate = []
    for config in configs:
        with tempfile.TemporaryDirectory() as folder:
            world_size, traces = _train(config, cases, arguments.processes, precision, Path(folder))
        for case, reference, trace in zip(cases, references, traces, strict=True):
            verdict = compare(trace, reference, precision)
            print(
                f"{config.stem:<16}{world_size:>6}  {case.optimizer:<10}{case.accumulation:>14}  "
                f"{'tied' if case.tied else 'untied':<9}{verdict.loss:>9.0e}{verdict.norm:>9.0e}{verdict.weight:>9.0e}"
                f"  {'yes' if verdict.equal else 'NO'}",
                flush=True,
            )
            row = {"config": str(config), "world_size": world_size, **vars(case), **verdict.as_dict()}
            if not verdict.equal:
                row["parts_at"] = _locate(config, case, arguments.processes, precision)
                print(f"    {row['parts_at']}", flush=True)
            certificate.append(row)
    failed = sum(not row["equal"] for row in certificate)
    print(f"\n{len(certificate) - failed} of {len(certificate)} equal the single-process run.")
    content = {"schema": 1, "precision": precision, "loss_tolerance": allowed.loss, "norm_tolerance": allowed.norm}
    content |= {"weight_tolerance": allowed.weight}
    return strict_json.dumps({**content, "cases": certificate}, indent=2) + "\n"


def _mixed(precision: str) -> str:
    """accelerate's word for a precision."""
    return "no" if precision == "fp32" else precision


def _check(config: Asked, processes: int | None) -> None:
    """Raises ValueError where the certificate's batches do not divide over the ranks."""
    from shardrun.certify.equivalence import Case

    world_size = processes or config.world_size
    if config.strategy == "single" and world_size > 1:
        raise UserError(f"{config.path} is for one process (distributed_type NO), not {world_size}.")
    if Case.rows % (world_size * 3):
        fitting = ", ".join(str(n) for n in range(1, Case.rows) if Case.rows % (n * 3) == 0)
        raise UserError(
            f"{config.path}: {world_size} processes do not divide the certificate's batches of {Case.rows} rows in 3 "
            f"micro-batches; pass --processes with one of {fitting}."
        )


def _train(
    config: Path,
    cases: list,  # type: ignore[type-arg]
    processes: int | None,
    precision: "Precision",
    folder: Path,
    phases: bool = False,
) -> tuple[int, list]:  # type: ignore[type-arg]
    """Train the cases under a config; returns the world size and the traces. Raises ValueError where it fails."""
    import torch

    from shardrun.certify.equivalence import Trace

    (folder / "cases.json").write_text(strict_json.dumps([vars(case) for case in cases]), encoding="utf-8")
    options = ["--mixed_precision", _mixed(precision)]
    if processes:
        options += ["--num_processes", str(processes)]
    arguments = [str(folder), *(["--phases"] if phases else [])]
    log = folder / "log.txt"
    status = launch(config, "shardrun.certify.rank", arguments, options, log)
    if status:
        raise UserError(f"the run under {config} ended with status {status}: {what_went_wrong(log)}")
    result = torch.load(folder / "traces.pt", weights_only=True)
    return result["world_size"], [Trace(**trace) for trace in result["traces"]]


def _locate(config: Path, case, processes: int | None, precision: "Precision") -> str:  # type: ignore[no-untyped-def]
    """Train a case again with every phase recorded, and say where it first parts from the reference."""
    from shardrun.certify.equivalence import TOLERANCES, first_parting, run_reference

    tolerance = 1e-4 if precision == "fp32" else 10 * TOLERANCES[precision].norm  # of one tensor's elements
    with tempfile.TemporaryDirectory() as folder:
        _, traces = _train(config, [case], processes, precision, Path(folder), phases=True)
    return "parts at " + first_parting(traces[0], run_reference(case, phases=True), tolerance)
