"""The Python that starts warm does what Python does: arguments, environment, folder, files, status, signals."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the fixture is the Python that runs the tests"),
]

SEEN = "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['SEEN'], sys.stdin.read(), 'torch' in sys.modules)"


@pytest.mark.parametrize("form", ("-c", "-m", "file"))
def test_a_program_sees_what_it_was_given(warm_python: str, tmp_path: Path, form: str) -> None:
    (tmp_path / "seen.py").write_text(SEEN)
    program = {"-c": ["-c", SEEN], "-m": ["-m", "seen"], "file": [str(tmp_path / "seen.py")]}[form]
    done = subprocess.run(
        [warm_python, "-u", *program, "a", "b c"],
        cwd=tmp_path, env={**os.environ, "SEEN": "yes"}, input="typed", text=True, capture_output=True,
    )  # fmt: skip
    assert done.stdout == f"['a', 'b c'] {tmp_path} yes typed True\n", done.stderr


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("import os; os._exit(4)", 4, ""),
        ("raise SystemExit('a sentence')", 1, "a sentence"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
    ],
)
def test_it_ends_as_the_program_ends(warm_python: str, code: str, status: int, words: str) -> None:
    done = subprocess.run([warm_python, "-c", code], text=True, capture_output=True)
    assert done.returncode == status and words in done.stderr


def test_signals_reach_the_program(warm_python: str) -> None:
    code = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print('ready', flush=True); "
    code += "time.sleep(60)"
    with subprocess.Popen([warm_python, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(30) == 7


def test_what_it_starts_is_warm_too_and_what_it_does_not_know_is_left_to_python(warm_python: str) -> None:
    code = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', \"import sys; print('torch' in sys.modules)\"])"
    )
    assert subprocess.run([warm_python, "-c", code], text=True, capture_output=True).stdout == "True\n"
    assert subprocess.run([warm_python, "--version"], text=True, capture_output=True).stdout.startswith("Python 3.")
