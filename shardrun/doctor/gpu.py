"""GPUs: what the driver sees, whether torch's CUDA and NCCL fit it, what is free on them."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from shardrun.doctor import shell, topology
from shardrun.doctor.python import ROOT, requirements
from shardrun.doctor.report import Finding

OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""Major version of CUDA → the oldest driver branch that runs all of it (NVIDIA's minor version compatibility)."""


@dataclass(frozen=True)
class FoundGpu:
    """One GPU as nvidia-smi lists it; memory in MiB, 0 where it does not say."""

    index: int
    name: str
    memory: int
    used: int


@dataclass(frozen=True)
class Driver:
    """What nvidia-smi says. `error` is its complaint where it fails; neither GPUs nor error: there is no driver."""

    version: str = ""
    gpus: tuple[FoundGpu, ...] = ()
    error: str = ""
    topology: str = ""


@dataclass(frozen=True)
class Torch:
    """The installed torch, read without loading it. `cuda` is () for a build without."""

    version: str
    cuda: tuple[int, ...]
    rocm: bool


def read_driver(timeout: float = 30) -> Driver:
    """Ask nvidia-smi."""
    fields = "index,driver_version,memory.total,memory.used,name"
    try:
        status, listed = _smi(f"--query-gpu={fields}", "--format=csv,noheader,nounits", timeout=timeout)
        if status:
            return Driver(error=next(iter(listed.strip().splitlines()), f"it ends with status {status}"))
        gpus, version = [], ""
        for row in listed.strip().splitlines():
            index, version, memory, used, name = (word.strip() for word in row.split(",", 4))
            gpus.append(FoundGpu(int(index), name, *(int(n) if n.isdigit() else 0 for n in (memory, used))))
        matrix = _smi("topo", "-m", timeout=timeout)[1] if len(gpus) > 1 else ""
    except FileNotFoundError:
        return Driver()
    except subprocess.TimeoutExpired:
        return Driver(error=f"no answer within {timeout:.0f} s")
    except ValueError:
        return Driver(error=f"its answer makes no sense: {next(iter(listed.strip().splitlines()), '')[:60]}")
    return Driver(version, tuple(gpus), "" if gpus else "no devices were found", matrix)


def _smi(*arguments: str, timeout: float) -> tuple[int, str]:
    """nvidia-smi's exit status and output. Raises FileNotFoundError where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        raise FileNotFoundError("nvidia-smi")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout or done.stderr


def installed_torch() -> Torch | None:
    """What torch/version.py says, without importing torch (seconds). None where torch is not installed."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    values = dict(re.findall(r"^(\w+)[^=\n]*= '([^']+)'", text, flags=re.MULTILINE))
    cuda = tuple(int(number) for number in values.get("cuda", "").split(".") if number)
    return Torch(values["__version__"], cuda, "hip" in values)


def driver(found: Driver, torch: Torch | None) -> Iterator[Finding]:
    """Whether the driver answers, and whether torch is built for what it can do."""
    if torch is None:
        return  # said under packages
    for_what = f"torch {torch.version}"
    if found.error:
        yield Finding("driver", "failure", f"nvidia-smi fails: {found.error}", _repair(found.error))
    elif not found.gpus and os.path.exists("/proc/driver/nvidia/version") and shutil.which("nvidia-smi") is None:
        said = "the NVIDIA driver is loaded, but nvidia-smi is not on the PATH (in a container: it was started without)"
        yield Finding("driver", "warning", said, "docker run --gpus all …")
    elif not found.gpus:
        yield Finding(
            "torch", "ok", f"{torch.version}; no NVIDIA GPU here: everything runs on CPU over gloo (configs cpu/)"
        )
    elif torch.rocm:
        said = f"{for_what} is built for AMD GPUs, and this machine has an NVIDIA driver ({found.version})"
        yield Finding("torch", "failure", said, other_torch())
    elif not torch.cuda:
        said = f"{for_what} is a build without CUDA, and there are {len(found.gpus)} GPUs (driver {found.version})"
        yield Finding("torch", "failure", said, other_torch())
    else:
        built = ".".join(map(str, torch.cuda))
        needed = OLDEST_DRIVER.get(torch.cuda[0], 0)
        branch = int(found.version.split(".")[0] or 0)
        if branch < needed:
            runs = max((major for major, oldest in OLDEST_DRIVER.items() if oldest <= branch), default=0)
            other = f", or install a torch built for CUDA {runs}" if runs else ""
            said = (
                f"{for_what} is built for CUDA {built}, which needs driver {needed} or newer; this is {found.version}"
            )
            yield Finding(
                "torch",
                "failure",
                f"{said}. Update the driver{other}",
                f"sudo apt install nvidia-driver-{needed}  # on Ubuntu",
            )
        else:
            yield Finding("torch", "ok", f"{torch.version}, built for CUDA {built}; driver {found.version} runs it")


def _repair(error: str) -> str:
    """For nvidia-smi's best-known complaints."""
    if "mismatch" in error:
        return "sudo reboot  # the driver was updated under the running kernel"
    if "communicate with the NVIDIA driver" in error:
        return "sudo modprobe nvidia  # and where that fails, install the driver again: its module is not this kernel's"
    return "nvidia-smi"


def other_torch() -> str:
    """Replace torch by the build for this machine."""
    if (ROOT / "scripts" / "setup.py").is_file():
        return "make setup"
    name = shell.current()
    wanted = next(text for text in requirements() if text.startswith("torch"))
    return "\n".join(
        shell.command([sys.executable, "-m", "pip", *words], name)
        for words in (["uninstall", "--yes", "torch"], ["install", wanted])
    )


def gpus(found: Driver) -> Iterator[Finding]:
    """Which GPUs, all of a kind or not, what others hold on them, what hides them, and how they are joined."""
    if not found.gpus:
        return
    kinds = {gpu.name for gpu in found.gpus}
    listed = ", ".join(f"{sum(g.name == kind for g in found.gpus)}× {kind}" for kind in sorted(kinds))
    memory = min(gpu.memory for gpu in found.gpus)
    said = f"{listed}, {memory / 1024:.0f} GiB" + (" at least" if len(kinds) > 1 else " each")
    if len(kinds) > 1:
        said += "; the slowest sets the pace and the smallest the size"
        same = ",".join(str(g.index) for g in found.gpus if g.name == found.gpus[0].name)
        yield Finding("GPUs", "warning", said, f"accelerate launch --gpu_ids {same} …")
    else:
        yield Finding("GPUs", "ok", said)
    busy = [gpu for gpu in found.gpus if gpu.memory and gpu.used > gpu.memory / 10]
    if busy:
        held = ", ".join(f"GPU {gpu.index}: {gpu.used / 1024:.1f} GiB" for gpu in busy)
        fix = "nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv"
        yield Finding("GPU memory", "warning", f"other programs hold some of it ({held})", fix)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        said = f"CUDA_VISIBLE_DEVICES is {hidden!r}: programs see only these of the {len(found.gpus)} GPUs"
        yield Finding("visible GPUs", "warning", said, shell.unset(["CUDA_VISIBLE_DEVICES"], shell.current()))
    if len(found.gpus) > 1:
        yield from topology.links(found.topology)


def loaded_torch(answer: dict, found: Driver) -> Iterator[Finding]:  # type: ignore[type-arg]
    """What the loaded torch sees (`probe.TORCH`) beside what the driver sees, and which NCCL it got."""
    expected = len(found.gpus)
    if answer["gpus"] < expected and "CUDA_VISIBLE_DEVICES" not in os.environ:
        said = f"loaded, it sees {answer['gpus']} of {expected} GPUs"
        complain = shell.command([sys.executable, "-c", "import torch; torch.zeros(1).cuda()"], shell.current())
        yield Finding("torch", "failure", said, f"{complain}  # says why")
    elif answer["gpus"]:
        old = {tuple(c) for c in answer["capabilities"] if not _compiled_for(tuple(c), answer["architectures"])}
        if old:
            shown = ", ".join(f"{major}.{minor}" for major, minor in sorted(old))
            said = f"has no code for GPUs of compute capability {shown}, only for {' '.join(answer['architectures'])}"
            yield Finding("torch", "failure", said, other_torch())
        elif not answer["bf16"]:
            said = "these GPUs have no bf16, in which the shipped configs compute"
            yield Finding("bf16", "failure", said, "accelerate launch --mixed_precision fp16 --config_file …")
        else:
            yield Finding("torch", "ok", f"loaded, it sees {answer['gpus']} GPUs")
    else:
        yield Finding("torch", "ok", "loads")
    if answer["nccl"]:
        yield from _nccl(".".join(map(str, answer["nccl"])))
    if not answer["gloo"]:
        yield Finding(
            "gloo", "failure", "this torch is built without gloo, which every run on CPU needs", other_torch()
        )


def _compiled_for(capability: tuple[int, ...], architectures: list[str]) -> bool:
    """Code for sm_XY runs on X.Z with Z ≥ Y; compute_XY (PTX) on everything from X.Y on."""
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = re.match(r"\d+", number)
        if digits:
            built = int(digits[0][:-1]), int(digits[0][-1])
            if (kind == "compute" and capability >= built) or (capability[0] == built[0] and capability >= built):
                return True
    return False


def _nccl(loaded: str) -> Iterator[Finding]:
    """The NCCL that was loaded beside the one that torch was built with."""
    wanted = re.search(r"(nvidia-nccl-\w+)==([\d.]+)", " ".join(metadata.requires("torch") or []))
    if wanted and wanted[2] != loaded:
        said = f"{loaded} was loaded, torch is built with {wanted[2]}"
        if os.environ.get("LD_LIBRARY_PATH"):
            fix = shell.unset(["LD_LIBRARY_PATH"], shell.current())
            said += "; LD_LIBRARY_PATH leads to another one"
        else:
            fix = shell.command([sys.executable, "-m", "pip", "install", wanted[0]], shell.current())
        yield Finding("NCCL", "warning", said, fix)
    else:
        yield Finding("NCCL", "ok", loaded)
