"""A user's mistake is one sentence; a ValueError of somebody else's is never shown as if it were one."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for top in ("speedrun", "strategies", "shardrun", "benchmarks") for path in (ROOT / top).rglob("*.py")]

RANK = """
from speedrun.run.ending import guarded
from strategies.errors import UserError

def job():
    {}

guarded(job)
"""


def test_no_mistake_of_a_user_is_a_plain_value_error() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Call) and ast.unparse(node.func) == "ValueError"), (path, node.lineno)


@pytest.mark.parametrize(
    ("job", "status", "said"),
    [
        ("raise UserError('steps is 0; take one at least.')", 2, "shardrun: error: steps is 0; take one at least."),
        ("int('two')", 1, "Traceback (most recent call last)"),
        ("import json; json.loads('{')", 1, "json.decoder.JSONDecodeError"),
    ],
)
def test_a_rank_ends_with_a_sentence_of_ours_and_with_a_traceback_of_others(job: str, status: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", RANK.format(job)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status and said in done.stderr
    assert ("Traceback" in done.stderr) == (status == 1)
    assert ("shardrun: error: invalid literal" in done.stderr) is False


def test_a_verb_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from shardrun import __main__, explain
    from strategies.errors import UserError

    def mistaken(arguments: object) -> int:
        raise UserError("no such thing.")

    monkeypatch.setattr(explain, "run", mistaken)
    with pytest.raises(SystemExit, match="2"):
        __main__.main(["explain", "cpu/ddp"])
    assert capsys.readouterr().err == "shardrun: error: no such thing.\n"
    monkeypatch.setattr(explain, "run", lambda arguments: int("two"))
    with pytest.raises(ValueError, match="invalid literal"):
        __main__.main(["explain", "cpu/ddp"])
