"""DeepSpeed: whether it loads, and whether its compiled operators fit (Shardrun's ZeRO needs none of them)."""

import sys
from collections.abc import Iterator

from shardrun.doctor import shell
from shardrun.doctor.probe import DEEPSPEED, Unanswered, ask
from shardrun.doctor.report import Finding


def deepspeed(timeout: float) -> Iterator[Finding]:
    """Load it in a process of its own, for this machine's device."""
    if not sys.platform.startswith("linux"):
        said = "has wheels for Linux only: zero1, zero2 and zero3 are missing here, fsdp shards the same things"
        yield Finding("DeepSpeed", "warning", said, "shardrun explain cpu/fsdp")
        return
    try:
        yield from judged(ask(DEEPSPEED, timeout))
    except Unanswered as why:
        fix = [sys.executable, "-m", "pip", "install", "--force-reinstall", "--no-deps", "deepspeed>=0.19.3,<0.20"]
        yield Finding("DeepSpeed", "failure", f"does not load: {why}", shell.command(fix, shell.current()))


def judged(answer: dict) -> Iterator[Finding]:  # type: ignore[type-arg]
    """What its answer (`probe.DEEPSPEED`) means."""
    again = [sys.executable, "-m", "pip", "install", "--force-reinstall", "--no-deps", "--no-cache-dir"]
    fix = shell.command([*again, f"deepspeed=={answer['version']}"], shell.current())
    yield Finding("DeepSpeed", "ok", f"{answer['version']} loads")
    torch = ".".join(answer["torch"].split(".")[:2])
    if answer["built"] and answer["built_for"] != torch:
        built = ", ".join(answer["built"])
        said = f"compiled for torch {answer['built_for']}, and this is {torch}, so that using them would crash: {built}"
        yield Finding("DeepSpeed's ops", "failure", said, fix)
        return
    missing = [f"no {name}" for name in ("ninja", "compiler") if not answer[name]]
    cuda = answer["torch_cuda"]
    if cuda and answer["nvcc"] and answer["nvcc"][0] != int(cuda.split(".")[0]):
        nvcc = ".".join(map(str, answer["nvcc"]))
        missing.append(f"nvcc is of CUDA {nvcc}, torch of {cuda}")
    elif cuda and not answer["nvcc"]:
        missing.append("no nvcc")
    built = f"compiled ahead: {', '.join(answer['built'])}" if answer["built"] else "none is compiled ahead"
    now = f"they could not be compiled here ({', '.join(missing)})" if missing else "they can be compiled here"
    yield Finding("DeepSpeed's ops", "ok", f"{built}; {now}; Shardrun's ZeRO needs none")
