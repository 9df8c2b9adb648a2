"""The command line of `python -m benchmarks.gpu`. Only the standard library: it runs wherever torch is installed."""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import benchmarks.gpu
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.report import NO_CARD, report
from benchmarks.gpu.results import Result, write_json
from benchmarks.gpu.runner import last_lines, run

ROOT = Path(__file__).parents[2]
SOURCES = ("benchmarks", "speedrun", "strategies", "shardrun", "accelerate_configs", "tests/kernels")

SETTLED = ("done", "failed", "over its limit")
"""Of a part that is not run again on the same sources, unless --only names it."""

CARD_FOLDER, TINY_FOLDER = "benchmarks/gpu", "runs/gpu-tiny"
"""Where results go. The latter is never committed: nothing made on a CPU may pass for a GPU's."""

CARD_SECONDS = 120
"""Limit of the look at the machine itself."""

TINY_SECONDS = 300
"""Limit of a part at tiny sizes: a few seconds, but for what else the machine does."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=benchmarks.gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Parts: " + "; ".join(f"{part.name}: {part.title}" for part in PARTS) + ".",
    )
    parser.add_argument("--minutes", type=float, default=8, help="for all parts together (default: 8)")
    names = [part.name for part in PARTS]
    parser.add_argument("--only", action="append", choices=names, metavar="NAME", help="this part, done or not")
    parser.add_argument("--peer", type=Path, metavar="FOLDER", help="a checkout of nanoGPT, timed beside `gpt2`")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, at sizes that say nothing of speed")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the results (default: benchmarks/gpu)")
    options = parser.parse_args()
    if not options.minutes > 0:
        sys.exit(f"--minutes {options.minutes:g} is no time; give a number of minutes above 0.")
    if find_spec("torch") is None:
        sys.exit(f"benchmarks.gpu needs torch, and {sys.executable} has none: name another Python.")
    if options.peer and not (options.peer / "model.py").is_file():
        sys.exit(f"--peer {options.peer} holds no model.py: give the folder of a checkout of nanoGPT.")
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a shell lets background jobs ignore it
        signal.signal(number, signal.default_int_handler)
    try:
        sys.exit(examine(options, PARTS))
    except KeyboardInterrupt:
        print(f"\ninterrupted; what is done is kept. This goes on:\n  {again()}", flush=True)
        sys.exit(130)


def examine(options: argparse.Namespace, parts: Sequence[Part]) -> int:
    """Run the parts that are not done, as many as fit into the time. Returns the exit status: 0 where all ran well."""
    deadline = time.monotonic() + 60 * options.minutes
    machine, cuda = look_at(options)
    tiny = not cuda
    out = options.out or ROOT / (TINY_FOLDER if tiny else CARD_FOLDER)
    card = str(machine["card"])
    file = out / f"{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}.json"
    logs = file.with_suffix("")
    logs.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"parts": {}}
    state |= {"schema": 1, "card": card, "tiny": tiny, "machine": machine}
    state["parts"] = {part.name: state["parts"][part.name] for part in parts if part.name in state["parts"]}
    sources, commit = sources_hash(), commit_of()
    print(f"{card}{f': {NO_CARD}' if tiny else ''}. Results: {file.with_suffix('.md')}", flush=True)

    def keep(part: Part, **record: Any) -> None:
        about = {"machine": machine, "commit": commit, "sources": sources, "arguments": arguments_of(part, options)}
        empty = {"seconds": 0.0, "result": {"notes": [], "tables": {}, "missing": []}, "last lines": []}
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        state["parts"][part.name] = {**empty, "when": when, **about, **record}
        write_json(file, state)
        file.with_suffix(".md").write_text(report(state), encoding="utf-8")

    for part in parts:
        if options.only and part.name not in options.only:
            continue
        record = state["parts"].get(part.name)
        if record and not options.only and settled(record, sources, arguments_of(part, options)):
            print(f"{part.name}: {record['status']} before", flush=True)
            continue
        if missing := [package for package in part.packages if find_spec(package) is None]:
            note = f"Left out: {sentence(missing)} not installed."
            print(f"{part.name}: {note}", flush=True)
            keep(part, status="left out", result={"notes": [note], "tables": {}, "missing": missing})
            continue
        limit, remaining = TINY_SECONDS if tiny else part.seconds, deadline - time.monotonic()
        if remaining < limit / 2:
            print(f"{part.name}: not begun, too little time is left", flush=True)
            continue
        one(part, options, tiny, logs, min(limit, remaining), remaining < limit, keep)

    return verdict(state, parts, sources, options)


def look_at(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The machine: card, versions, rates; and whether there is CUDA. Exits where torch cannot say."""
    folder = (options.out or ROOT / "runs").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    file, log = folder / "gpu-card.json", folder / "gpu-card.log"
    file.unlink(missing_ok=True)
    status = run(
        command_of("benchmarks.gpu.card", file, [], options.tiny), ROOT, log, CARD_SECONDS, environment(options.tiny)
    )
    if status != 0:
        why = "did not end" if status is None else f"ended with status {status}"
        sys.exit("\n".join([f"the look at the machine {why}; the end of {log}:", *last_lines(log)]))
    machine = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return machine, machine.pop("cuda")


def one(
    part: Part,
    options: argparse.Namespace,
    tiny: bool,
    logs: Path,
    seconds: float,
    cut: bool,
    keep: Callable[..., None],
) -> None:
    """Run a part and keep its record. seconds: its limit; cut: by the end of the time, not by the part's own."""
    file, log = logs.resolve() / f".{part.name}.json", logs.resolve() / f"{part.name}.log"
    clear(file)
    print(f"{part.name}: {part.title} (at most {seconds:.0f} s) …", end=" ", flush=True)
    started, status = time.monotonic(), "interrupted"
    try:
        ended = run(
            command_of(part.module, file, arguments_of(part, options), tiny),
            ROOT,
            log,
            seconds,
            environment(tiny, "triton" in part.packages),
        )
        status = {None: "cut off, the time was over" if cut else "over its limit", 0: "done"}.get(ended, "failed")
    finally:
        took = time.monotonic() - started
        print(f"{status}, {took:.0f} s" + ("" if status == "done" else f", see {log}"), flush=True)
        record = {"status": status, "seconds": took, "last lines": [] if status == "done" else last_lines(log)}
        if file.exists():
            record["result"] = json.loads(file.read_text(encoding="utf-8"))
        clear(file)
        keep(part, **record)


def clear(file: Path) -> None:
    """Away with what a part, or one that was killed, has left beside its log."""
    file.unlink(missing_ok=True)
    shutil.rmtree(Result(file).folder, ignore_errors=True)


def settled(record: dict[str, Any], sources: str, arguments: list[str]) -> bool:
    """Whether running it again could say nothing new."""
    same = record["sources"] == sources and record["arguments"] == arguments
    waits_for = record["result"]["missing"]
    if any(find_spec(package) for package in waits_for):
        return False
    return same and record["status"] in (*SETTLED, "left out")


def verdict(state: dict[str, Any], parts: Sequence[Part], sources: str, options: argparse.Namespace) -> int:
    """Say what is left, and how to go on; 0 where every part ran to its end and nothing was left out of any."""
    records = {part.name: state["parts"].get(part.name) for part in parts}
    open_ = [
        part.name
        for part in parts
        if not (record := records[part.name]) or not settled(record, sources, arguments_of(part, options))
    ]
    wrong = [name for name, record in records.items() if record and record["status"] in ("failed", "over its limit")]
    lacking = sorted({package for record in records.values() if record for package in record["result"]["missing"]})
    if lacking:
        print(f"left out for want of {', '.join(lacking)}: install what is wanted and give the command again.")
    if wrong:
        print(f"not well: {', '.join(wrong)} (again after a change of the sources, or with --only NAME).")
    if open_:
        print(f"not yet run: {', '.join(open_)}. This goes on:\n  {again()}")
    return 1 if open_ or wrong or lacking else 0


def again() -> str:
    """The command that this process was started by, without --only."""
    words = sys.argv[1:]
    while "--only" in words:
        at = words.index("--only")
        del words[at : at + 2]
    words = [word for word in words if not word.startswith("--only=")]
    return shlex.join([sys.executable, "-m", "benchmarks.gpu", *words])


def arguments_of(part: Part, options: argparse.Namespace) -> list[str]:
    peer = ["--peer", str(options.peer.resolve())] if options.peer and part.name == "steps-gpt2" else []
    return [*part.arguments, *peer]


def command_of(module: str, file: Path, arguments: list[str], tiny: bool) -> list[str]:
    return [sys.executable, "-m", module, str(file), *arguments, *(["--tiny"] if tiny else [])]


def environment(tiny: bool, kernels: bool = False) -> dict[str, str]:
    """This checkout is importable; tiny sizes see no GPU, and kernels run in Triton's interpreter there."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if tiny else {}
    return {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "TRITON_INTERPRET": str(int(tiny and kernels)),
        **hidden,
    }


def sources_hash() -> str:
    """Of all that a result depends on in this checkout, committed or not."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def commit_of() -> str:
    """The commit, and whether a source is changed; unknown in a copy without git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True).stdout

    try:
        commit, status = git("rev-parse", "--short=10", "HEAD").strip(), git("status", "--porcelain", "--", *SOURCES)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    changed = any(line.endswith((".py", ".yaml", "/")) for line in status.splitlines())
    return f"{commit} with changes" if changed else commit


def sentence(packages: list[str]) -> str:
    """`the package a is`, `the packages a and b are`."""
    if len(packages) == 1:
        return f"the package {packages[0]} is"
    return f"the packages {', '.join(packages[:-1])} and {packages[-1]} are"


if __name__ == "__main__":
    main()
