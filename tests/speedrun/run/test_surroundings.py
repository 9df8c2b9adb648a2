"""A run and the verbs without HOME, USER or a writable home, in a folder of any name, with spaces in TMPDIR.

What is compiled there: tests/model/test_compiling.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.speedrun.runs import metrics

ROOT = Path(__file__).parents[3]

RUN = """
import os, pwd, sys
def nobody(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = nobody
from shardrun.__main__ import main
for arguments in (["lesson", "list"], ["lesson", "start", "1"], ["data", "inspect", "te xt"], ["doctor", "--quick"]):
    try:
        main(arguments)
    except SystemExit as end:
        assert end.code in ((0, 1) if arguments[0] == "doctor" else (0,)), (arguments, end.code)
from speedrun.run.ending import guarded
from speedrun.train import main as train
options = "--steps 1 --eval-every 0 --untimed-steps 0 --data.global-batch 2 --data.sequence-length 16 --model.layers 1"
options += " --data.eval-tokens 64 --progress plain --name läufe"
sys.argv = ["train", "tiny", *options.split(), "--out", "r x", "--data.source", "te xt"]
guarded(train)
"""


@pytest.mark.slow
def test_a_run_needs_nothing_of_its_surroundings(tmp_path: Path) -> None:
    folder = tmp_path / "ä ö 漢"
    (folder / "te xt").mkdir(parents=True)
    for number in range(30):
        (folder / "te xt" / f"{number} ß.txt").write_text(f"text {number} " * 20)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=folder, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["step"] for line in metrics(folder / "r x" / "läufe")] == [0, 1]
