"""`shardrun lesson check --show`: the messages of an attempt as a picture, beside the solution's."""

import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import xml.etree.ElementTree as ElementTree
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardrun.__main__ import main
from shardrun.by_path import import_file
from shardrun.lesson import called
from shardrun.lesson.course import course, find_lesson
from shardrun.lesson.judge import Outcome
from shardrun.lesson.messages import shown
from shardrun.lesson.messages.moments import place, squeezed
from shardrun.lesson.messages.read import Call, exposed, read, telling, together
from shardrun.lesson.messages.recorder import MessageRecorder
from shardrun.lesson.messages.svg import document
from shardrun.lesson.messages.text import draw
from shardrun.lesson.messages.words import EXPOSED, MOST, safe, totals
from shardrun.lesson.versions import wrong_versions
from shardrun.own import OWN, register
from strategies import catalogue
from tests.ranks import RankPool

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"

TALKATIVE = """
import torch
import torch.distributed as dist

def average_gradients(model):
    for p in (p for p in model.parameters() if p.grad is not None):
        every = [torch.empty_like(p.grad) for _ in range(dist.get_world_size())]
        dist.all_gather(every, p.grad)
        p.grad = sum(every) / dist.get_world_size()
"""


def events(*lines: dict[str, Any], ranks: int = 2, what: str = "x = 1", done: bool = True) -> str:
    """A rank's file with one call."""
    end = [{"done": True}] if done else []
    return "".join(json.dumps(line) + "\n" for line in ({"call": what, "ranks": ranks}, *lines, *end))


def sent(number: int, collective: str = "all_reduce", bytes: int = 28, peer: int | None = None) -> dict[str, Any]:
    told = {"sent": number, "collective": collective, "bytes": bytes, "group": "0", "inside": False}
    return told if peer is None else {**told, "peer": peer}


WAIT = ({"wait": [0]}, {"waited": [0]})
WORK = {"work": "gradient of w"}


def calls(*texts: str) -> list[Call]:
    return [read(text)[0] for text in texts]


def test_who_comes_early_waits_for_the_last() -> None:
    moments = place(calls(events(sent(0), *WAIT), events(WORK, WORK, WORK, sent(0), *WAIT)))
    early, late = moments.rows
    assert early.waits == [(1, 4)] and late.waits == [(4, 4)] and moments.columns == 5
    assert [(bar.first, bar.last) for bar in early.bars] == [(0, 4)]
    lines = [line.plain for line in draw(moments, 80)]
    assert lines[0].count("░") == 4 * lines[2].count("░") and lines[2].count("█") == 3 * lines[2].count("░")


def test_a_receive_ends_after_its_send() -> None:
    moments = place(calls(events(WORK, sent(0, "send", peer=1), *WAIT), events(sent(0, "recv", peer=0), *WAIT)))
    assert moments.rows[1].bars[0].last == moments.rows[0].bars[0].first + 1 == 2


def test_exposed_is_what_is_waited_for_with_nothing_computed() -> None:
    hidden, late = events(WORK, sent(0), WORK, *WAIT), events(WORK, sent(0), *WAIT, WORK)
    assert [exposed(call) for call in calls(hidden, late)] == [set(), {0}]
    update = events(WORK, {"phase": "update"}, sent(0), *WAIT)  # where nothing is left to compute it is no mistake
    assert exposed(read(update)[0]) == set() == exposed(read(events(sent(0), *WAIT))[0])
    assert totals(calls(late))[EXPOSED] == "×1  28 B"
    assert "!]" in "".join(line.plain for line in draw(place(calls(late)), 80))


def test_what_never_ends_is_open_and_a_cut_off_file_is_read() -> None:
    hangs = events(sent(0), {"wait": [0]}, done=False) + '{"wai'
    moments = place(calls(hangs, events(WORK, done=False)))
    assert moments.rows[0].waits and not moments.rows[0].bars[0].message.waited
    assert any(line.plain.endswith("…") for line in draw(moments, 80))


def test_ranks_that_disagree_are_drawn_too() -> None:
    """Waited for although it was never sent, or in another order."""
    moments = place(calls(events(sent(0, "recv", peer=1), *WAIT), events(sent(0, "recv", peer=0), *WAIT)))
    crossed = place(
        calls(
            events(sent(0, "recv", peer=1), *WAIT, sent(1, "send", peer=1)),
            events(sent(0, "recv", peer=0), *WAIT, sent(1, "send", peer=0)),
        )
    )
    assert [len(row.bars) for row in (*moments.rows, *crossed.rows)] == [1, 1, 2, 2]


def test_the_call_that_is_shown_is_the_first_that_differs() -> None:
    same, more = events(sent(0), *WAIT, what="a"), events(sent(0), *WAIT, sent(1), what="b")
    less = events(sent(0), *WAIT, what="b")
    pair = events(sent(0), *WAIT, ranks=1, what="of fewer ranks")
    ours, theirs = telling(together((same + pair + more, same + more)), together((same + pair + less, same + less)))
    assert [call.what for call in ours] == ["b", "b"] and len(ours[0].messages) == 2 and len(theirs[0].messages) == 1
    ours, _ = telling(together((same + less,)), together((same + less,)))
    assert ours[0].what == "a"
    silent, theirs = telling(together((events(what="a"),)), together((same,)))
    assert not silent[0].messages and theirs[0].messages


@pytest.mark.parametrize("room", [40, 71, 80, 200])
def test_no_line_is_longer_than_its_room(room: int) -> None:
    many: list[dict[str, Any]] = []
    for number in range(30):
        many += [WORK, sent(number, "reduce_scatter", 10**number), WORK, {"phase": "wait"}]
    many += [each for number in range(30) for each in ({"wait": [number]}, {"waited": [number]})]
    moments = place(calls(events(*many), events(*many)))
    lines = draw(moments, room)
    assert max(map(len, lines)) <= room and sum("rank 1" in line.plain for line in lines) >= 1
    assert any("more at the same time" in line.plain for line in lines)
    assert squeezed(moments).columns <= moments.columns


def test_text_of_the_learners_breaks_neither_terminal_nor_svg() -> None:
    evil = "a\x1b[31m<b>&\"'\x00\ud800\u202e\n" + "x" * 500
    told = calls(events({"work": evil}, sent(0, evil), *WAIT, what=evil))
    text = document([("Yours", place(told)), ("The solution's", place([]))], evil, [told, []], [evil])
    tree = ElementTree.fromstring(text)
    assert "nothing is sent" in text and tree.tag == f"{SVG}svg"
    assert "\x1b" not in text and "\x1b" not in "".join(line.plain for line in draw(place(told), 80))
    assert safe(evil).isprintable() and len(safe(evil)) <= 200


def test_exercises_that_send_nothing_get_a_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lesson, attempt = find_lesson(4), tmp_path / "exercise.py"
    shown.show_exercise(lesson, lesson.exercise("my_rows"), attempt, Outcome("passed"))
    shown.show_exercise(lesson, lesson.exercise("average_gradients"), attempt, Outcome("unsolved"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "my_rows runs in one process: it sends nothing" in printed and "average_gradients is not begun" in printed
    assert not list(tmp_path.iterdir())


STEP = (WORK, sent(0), *WAIT, WORK)
"""Of a capstone."""


@pytest.mark.parametrize(
    ("outcome", "says", "drawn"),
    [
        (Outcome("passed", "", (events(*STEP),) * 2), "of all, exposed (!)", True),
        (
            Outcome("error", "no", (events(*STEP, done=False), events(*STEP))),
            "On rank 0 this did not come to its end",
            True,
        ),
        (Outcome("error", "my_ddp.py, line 3", ("", "")), "did not come to its first step", False),
        (Outcome("unsolved"), "my_ddp does not train yet", False),
    ],
)
def test_a_capstone_is_drawn_whether_it_passes_or_not(
    outcome: Outcome, says: str, drawn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    right = Outcome("passed", "", (events(WORK, sent(0), WORK, *WAIT),) * 2)
    monkeypatch.setattr("shardrun.lesson.judge.judge_level", lambda *_: Outcome("wrong", "Step 0, reduce: no."))
    monkeypatch.setattr(
        "shardrun.lesson.judge.record_step", lambda _, attempt, __: right if attempt.name == "by_hand.py" else outcome
    )
    for command in (["start", "4"], ["check", "4", "my_ddp", "--show"]):
        with pytest.raises(SystemExit):
            main(["lesson", *command])
    printed = " ".join(capsys.readouterr().out.split())
    assert "Step 0, reduce: no." in printed and says in printed
    assert (tmp_path / "learning/04_ddp/my_ddp.messages.svg").exists() is drawn is ("Picture: " in printed)


def recorded_calls(path: str, attempt: str, exercise: str) -> str:
    """On a rank: what is noted of an exercise of lesson 3 on a tensor of 28 bytes, and of a group of two."""
    function = getattr(import_file(Path(attempt), "exercise"), exercise)
    pair, file = dist.new_group([0, 1]), Path(f"{path}{dist.get_rank()}")
    with MessageRecorder(file) as recorder:
        dist.all_reduce(torch.zeros(1))  # not the learner's
        with recorder.call(f"chunk = <object at 0x{id(file):x}>"):
            function(torch.zeros(7))
        dist.barrier()
        if dist.get_rank() < 2:
            with recorder.call("in the pair"):
                work = dist.all_reduce(torch.zeros(3), group=pair, async_op=True)
                work.wait()
    return file.read_text()


@pytest.mark.ranks
def test_the_recorder_sees_a_right_and_a_too_talkative_attempt(ranks: RankPool, tmp_path: Path) -> None:
    solution = find_lesson(3).folder / "solution.py"
    talkative = tmp_path / "talkative.py"
    talkative.write_text(
        "import torch, torch.distributed as dist\n"
        "def all_gather(chunk):\n"
        "    rank, every = dist.get_rank(), [torch.empty_like(chunk) for _ in range(dist.get_world_size())]\n"
        "    for source in range(len(every)):\n"
        "        for to in range(len(every)):\n"
        "            if rank == source != to:\n"
        "                dist.send(torch.cat([chunk, chunk]), to)\n"
        "            elif rank == to != source:\n"
        "                dist.recv(torch.empty(14), source)\n"
    )
    right, loud = (
        together(tuple(ranks.run(3, recorded_calls, str(tmp_path / path.stem), str(path), "all_gather")))
        for path in (solution, talkative)
    )
    assert [[call.what for call in each] for each in right] == [["chunk = <object>"] * 3, ["in the pair"] * 2]
    assert totals(right[0]) == {"send": "×6  168 B", MOST: "×2  56 B"}
    assert totals(loud[0]) == {"send": "×6  336 B", MOST: "×2  112 B"}
    for each in (*right, *loud):
        assert all(message.waited for call in each for message in call.messages)
    assert {(m.collective, m.bytes, m.peer) for m in right[0][1].messages} == {("send", 28, 2), ("recv", 28, 0)}


def recorded_step(path: str, attempt: str) -> str:
    """On a rank: what is noted of a capstone's third step."""
    from lessons.capstone import recorded_step

    own, file = register(Path(attempt)), Path(f"{path}{dist.get_rank()}")
    try:
        with MessageRecorder(file) as called.CALLS.recorder:
            recorded_step.step(own)
    finally:
        called.CALLS.recorder = None
        del OWN[own.name], catalogue.FOLDERS[own.name]
    return file.read_text()


@pytest.mark.ranks
@pytest.mark.slow
def test_an_exposed_message_of_a_capstone_is_seen(ranks: RankPool, tmp_path: Path) -> None:
    (lesson,) = (lesson for lesson in course() if lesson.capstone and lesson.capstone.name == "my_ddp")
    version = next(each for each in wrong_versions(lesson) if each.name == "waited for at once")
    (tmp_path / "my_own.py").write_text(version.text)
    shutil.copy(lesson.folder / "by_hand.py", tmp_path)
    late, right = (
        together(tuple(ranks.run(2, recorded_step, str(tmp_path / name), str(tmp_path / f"{name}.py"))))[-1]
        for name in ("my_own", "by_hand")
    )
    assert late[0].what == right[0].what == "step 3" and all(call.done for call in (*late, *right))
    assert [c.sends for c in late] == [c.sends for c in right]
    last = len(right[0].messages) - 1
    assert exposed(right[0]) == {last} and exposed(late[0]) == set(range(last + 1))
    assert totals(late)[EXPOSED] == totals(late)["all_reduce"] != totals(right)[EXPOSED]
    rows = place(late).rows
    assert [name for _, name in rows[0].phases] == ["forward", "backward"] * 2
    assert {"gradient of embed.weight", "embed runs"} <= set(rows[0].work.values())
    svg = document([("Yours", place(late))], "my_ddp", [late], [])
    assert svg.count("nothing is computed meanwhile") == 2 * (last + 1)


@pytest.mark.ranks
@pytest.mark.slow
def test_check_show_in_a_terminal_of_80_columns(tmp_path: Path) -> None:
    """A right result that took too much: what the check says, then both pictures, then what was counted."""
    folder = tmp_path / "learning"
    for command in (["start", "4"], ["check", "4", "average_gradients", "--show"]):
        if command[0] == "check":
            (folder / "04_ddp" / "exercise.py").write_text(TALKATIVE)
        printed = in_terminal([sys.executable, "-m", "shardrun", "lesson", *command], tmp_path)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", printed).splitlines()
    assert "✗ average_gradients" in lines[1]
    picture = lines[next(i for i, line in enumerate(lines) if line.startswith("Yours")) :]
    assert max(map(len, picture)) <= 80, picture
    text = "\n".join(picture)
    assert "all_gather  " in text and "The solution's" in text and "░ waits" in text.replace("\N{NO-BREAK SPACE}", " ")
    assert re.search(r"all_gather +×12 +2,376 B +–", text) and re.search(r"all_reduce +– +×12 +792 B", text)
    path = folder / "04_ddp" / "average_gradients.messages.svg"
    assert f"Picture: {path.relative_to(tmp_path)}" in text
    tree = ElementTree.parse(path).getroot()
    tips = [title.text or "" for title in tree.iter(f"{SVG}title")]
    assert sum(tip.startswith("all_gather") for tip in tips) == sum(tip.startswith("all_reduce") for tip in tips) == 12


def in_terminal(command: list[str], folder: Path) -> str:
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    environment["PYTHONPATH"] = str(ROOT)
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=folder, env=environment)
    os.close(theirs)
    read_so_far = b""
    try:
        while part := os.read(ours, 65536):
            read_so_far += part
    except OSError:  # the other end is closed
        pass
    process.wait(timeout=100)
    os.close(ours)
    return read_so_far.decode().replace("\r\n", "\n")
