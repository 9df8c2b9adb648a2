"""The machine: shared memory, ports, disk, memory."""

import contextlib
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shardrun.doctor.report import Finding

GIB = 2**30

LAUNCH_PORT = 29500
"""Where accelerate's ranks meet if nothing else is said; the shipped configs say 0, any free port."""


def shared_memory(gpus: int, folder: str = "/dev/shm") -> Iterator[Finding]:
    """NCCL's ranks exchange data through it, in segments of some MiB for each pair of GPUs; containers get 64 MiB."""
    if not sys.platform.startswith("linux"):
        return
    name = "/dev/shm"
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        yield Finding(name, "failure", f"{folder} is not there or may not be written", f"sudo chmod 1777 {folder}")
        return
    space = shutil.disk_usage(folder)
    if space.total < GIB:
        said = f"{space.total / 2**20:.0f} MiB in all; NCCL on several GPUs needs more, 1 GiB is safe"
        fix = f"sudo mount -o remount,size=8G {folder}  # in a container: docker run --shm-size=8g …"
        yield Finding(name, "failure" if gpus > 1 else "warning", said, fix)
    elif space.free < GIB / 4:
        said = f"{space.free / 2**20:.0f} MiB of {space.total / GIB:.1f} GiB are free: what runs have left behind?"
        yield Finding(
            name, "failure" if gpus > 1 else "warning", said, f"ls -lS {folder}  # and remove what nothing uses"
        )
    else:
        yield Finding(name, "ok", f"{space.free / GIB:.1f} of {space.total / GIB:.1f} GiB free")


def ports(port: int = LAUNCH_PORT) -> Iterator[Finding]:
    """Whether ranks can meet on this machine's loopback, and whether accelerate's own port is free."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            with socket.create_connection(server.getsockname(), timeout=5) as client:
                accepted, _ = server.accept()
                with accepted:
                    client.sendall(b"?")
                    accepted.settimeout(5)
                    assert accepted.recv(1) == b"?"
    except OSError as error:
        said = f"a connection of this machine to itself (127.0.0.1) fails: {error}; a firewall or a sandbox forbids it"
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        yield Finding(
            "loopback", "failure", said, f"sudo ifconfig {loopback} up  # and let the firewall pass 127.0.0.1"
        )
        return
    yield Finding("loopback", "ok", "ranks on this machine can reach each other")
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        said = f"{port} is taken{_by_whom(port)}; configs without main_process_port: 0 fail there"
        yield Finding("port", "warning", said, "accelerate launch --main_process_port 0 …")
    else:
        yield Finding("port", "ok", f"{port} is free")


def _by_whom(port: int) -> str:
    """The program that listens there, where it may be known."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == "LISTEN" and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (process {connection.pid})"
    return ""


def disk() -> Iterator[Finding]:
    """Room where runs, downloads and temporary files go; each disk once."""
    cache = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    seen = set()
    for name, path in (("disk: runs", "."), ("disk: temporary", tempfile.gettempdir()), ("disk: downloads", cache)):
        folder = Path(path).absolute()
        while not folder.exists():
            folder = folder.parent
        if not os.access(folder, os.W_OK):
            fix = (
                "--out FOLDER  # of the trainer: where runs are written"
                if path == "."
                else f"sudo chown $USER {folder}"
            )
            yield Finding(name, "failure" if path != cache else "warning", f"{folder} may not be written", fix)
            continue
        device = folder.stat().st_dev
        if device in seen:
            continue
        seen.add(device)
        free = shutil.disk_usage(folder).free / GIB
        status = "failure" if free < 1 else "warning" if free < 10 else "ok"
        said = f"{free:.1f} GiB free in {folder}"
        if status != "ok":
            said += "; a checkpoint of a 124M model takes 1.5 GiB, FineWeb 20"
        yield Finding(name, status, said, "" if status == "ok" else _largest(folder))


def _largest(folder: Path) -> str:
    if sys.platform == "win32":
        return f"Get-ChildItem '{folder}' -Recurse -File | Sort-Object Length | Select-Object -Last 20"
    return f"du -xh -d 2 '{folder}' | sort -h | tail -n 20"


def memory(cgroup: str = "/sys/fs/cgroup") -> Iterator[Finding]:
    """Main memory that can still be had, in a container within its limit."""
    import psutil

    available, whose = psutil.virtual_memory().available, "free"
    limit = container_room(Path(cgroup))
    if limit is not None and limit < available:
        available, whose = limit, "left of this container's limit"
    free = available / GIB
    status = "failure" if free < 1 else "warning" if free < 3 else "ok"
    fix = (
        ""
        if status == "ok"
        else "ps aux --sort=-rss | head  # and end what is not needed; a container: docker run --memory"
    )
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    said = f"{free:.1f} GiB {whose}" + ("; two ranks of the smallest run need about 2" if fix else "")
    yield Finding("memory", status, said, fix)
    yield Finding("processors", "ok", f"{cores} cores")


def container_room(cgroup: Path) -> int | None:
    """Bytes that this control group (version 2) may still take; file caches do not count. None: no limit."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit == "max":
            return None
        lines = (cgroup / "memory.stat").read_text().splitlines()
        cached = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
        return int(limit) - int((cgroup / "memory.current").read_text()) + cached
    except (OSError, ValueError):
        return None
