"""The `python` of tests/warm.py: hands what it is asked for to the server, passes signals on, ends as the fork ends.

python -IS warm_client.py SOCKET INTERPRETED PYTHON arguments…; with arguments that the server does not know, and where
kernels are to be interpreted and the server's are not (INTERPRETED is 0, not 1), PYTHON itself runs.
"""

import array
import itertools
import json
import os
import signal
import socket
import struct
import sys

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGCONT)


def main(address: str, interpreted: str, python: str, *arguments: str) -> None:
    options = tuple(itertools.takewhile(lambda argument: argument in ("-u", "-B"), arguments))
    rest = arguments[len(options) :]
    kind = rest[0] if rest and rest[0] in ("-m", "-c") else "file"
    asked = rest if kind == "file" else rest[1:]
    too_late = os.environ.get("TRITON_INTERPRET") == "1" != interpreted  # it is read where Triton is imported
    if not asked or asked[0].startswith("-") or too_late:
        os.execv(python, [python, *arguments])
    files = [number for number in map(int, os.listdir("/proc/self/fd")) if _is_open(number)]  # not the listing's own
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    request = {
        "kind": kind,
        "arguments": asked,
        "unbuffered": "-u" in options,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "files": files,
    }
    text = json.dumps(request).encode()
    server.sendmsg(
        [struct.pack("I", len(text))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files).tobytes())]
    )
    server.sendall(text)
    (pid,) = struct.unpack("i", server.recv(4, socket.MSG_WAITALL))
    for number in PASSED_ON:
        signal.signal(number, lambda received, _: os.kill(pid, received))
    (status,) = struct.unpack("i", server.recv(4, socket.MSG_WAITALL))
    if status < 0:
        if -status in PASSED_ON:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


main(*sys.argv[1:])
