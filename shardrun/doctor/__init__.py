"""`shardrun doctor`: what is wrong with this machine's set-up, and the command that puts it right.

Each check is a function that yields lines: ok, a warning (training works, but not as one would think) or a failure.
The doctor's own process loads neither torch nor DeepSpeed: those are questioned in processes of their own, where a
crash or a hang is a find like any other.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from shardrun.doctor import python
from shardrun.doctor.report import Finding, Report
from strategies import catalogue
from strategies.errors import UserError

if TYPE_CHECKING:
    from shardrun.doctor.gpu import Driver


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="leave out what takes more than a second")
    parser.add_argument(
        "--timeout", type=float, default=300, metavar="SECONDS", help="what takes longer hangs (default: 300)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, at the end")


def run(arguments: argparse.Namespace) -> int:
    if arguments.timeout <= 0:
        raise UserError(f"--timeout {arguments.timeout:g} is no time; give a number of seconds above 0.")
    started = time.monotonic()
    report = Report(silent=arguments.json)
    examine(report, arguments.quick, arguments.timeout)
    if arguments.json:
        print(report.as_json())
    else:
        print(f"\n{report.verdict()} {time.monotonic() - started:.0f} s.")
        if arguments.quick:
            print("Left out by --quick: loading torch and DeepSpeed, two ranks, training.")
    return 1 if report.count("failure") else 0


def examine(report: Report, quick: bool, timeout: float) -> None:
    """Everything, in the order in which one thing needs another."""
    report.section("Python")
    report.take(python.version)
    if report.count("failure"):
        return  # the rest, the doctor's own code included, is written for another Python
    from shardrun.doctor import gpu, launcher, machine, tokens

    report.hide(tokens.secrets())
    report.take(python.which_python)
    report.take(python.scripts)
    report.take(python.virtual_environment)
    report.take(python.packages)

    report.section("GPUs")
    driver, torch = gpu.read_driver(), gpu.installed_torch()
    report.take(gpu.driver, driver, torch)
    report.take(gpu.gpus, driver)
    usable = len(driver.gpus) if torch and torch.cuda else 0

    report.section("Machine")
    report.take(machine.shared_memory, usable)
    report.take(machine.ports)
    report.take(machine.disk)
    report.take(machine.memory)

    report.section("Settings")
    report.take(launcher.default_config)
    report.take(launcher.environment_variables)
    report.take(tokens.hugging_face)
    report.take(tokens.weights_and_biases)

    if torch and not quick:
        _try_out(report, driver, timeout)


def _try_out(report: Report, driver: Driver, timeout: float) -> None:
    """What takes seconds to minutes: load the libraries, let two ranks work together, train."""
    from shardrun.doctor import collective, engine, gpu, probe, training

    report.section("Trying it out")
    report.doing("loading torch")
    try:
        answer = probe.ask(probe.TORCH, timeout)
    except probe.Unanswered as why:
        report.add(Finding("torch", "failure", f"does not load: {why}", gpu.other_torch()))
        return
    report.take(gpu.loaded_torch, answer, driver)
    every = ["single", *catalogue.spread()]
    strategies = every
    report.doing("loading DeepSpeed")
    if not report.take(engine.deepspeed, timeout) or not sys.platform.startswith("linux"):
        strategies = [name for name in strategies if not catalogue.books(name).needs]
    for backend in ("gloo", "nccl") if answer["gpus"] > 1 else ("gloo",):
        report.doing(f"two ranks over {backend}")
        if not report.take(collective.two_ranks, backend, timeout):
            strategies = ["single"]  # the others would hang one after the other
    for strategy in strategies:
        report.doing(f"training under {strategy}")
        report.take(training.train, strategy, answer["gpus"], timeout, report.redacted)
    left_out = ", ".join(name for name in every if name not in strategies)
    if left_out:
        report.add(Finding("training", "warning", f"not tried, because of what is said above: {left_out}"))
