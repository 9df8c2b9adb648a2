"""Curves at Weights & Biases: one run there for each history of a run, and what goes wrong with it ends nothing."""

import json
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from speedrun.run.checkpoints import Resumed
from speedrun.run.folder import RunFolder
from strategies.checkpoint.folder import name_of
from strategies.checkpoint.format import Index
from tests.speedrun.run.test_folder import STEP, run_folder
from tests.speedrun.runs import launch_of, metrics, read, small


class FakeWandb:
    """The parts of wandb that a record uses; keeps what it is given."""

    class Error(Exception):
        pass

    def __init__(self, reachable: bool = True, failing_step: int | None = None) -> None:
        self.reachable, self.failing_step = reachable, failing_step
        self.starts: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.ended: int | None = None

    def Settings(self, **settings: Any) -> Namespace:
        return Namespace(base_url="https://wandb.example", **settings)

    def init(self, **settings: Any) -> "FakeWandb":
        self.starts.append(settings)
        if settings.get("mode") != "offline" and not self.reachable:
            raise self.Error("no such host\nConsider another.")
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        if step == self.failing_step:
            raise RuntimeError("disk full")
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.ended = exit_code

    def teardown(self) -> None:
        assert self.ended is not None


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_without_a_key_curves_go_to_an_offline_run_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_key: None, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    opened = run_folder(tmp_path, log="wandb")
    opened.step({**STEP, "val_bits_per_byte": None})
    opened.finish("finished")
    assert [start["mode"] for start in wandb.starts] == ["offline"] and wandb.starts[0]["name"] == "run"
    assert wandb.starts[0]["config"]["launch"]["strategy"] == "ddp"
    assert wandb.logged == [(1, {key: value for key, value in STEP.items() if key != "step"})]
    assert {"val_loss", "train_loss", "train_time_ms", "step_avg_ms", "tokens"} <= set(wandb.logged[0][1])
    assert wandb.ended == 0
    assert capsys.readouterr().out.count("No Weights & Biases key") == 1


@pytest.mark.parametrize("where", ("environment", "netrc"))
def test_with_a_key_but_no_network_the_run_goes_on_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_key: None, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    wandb = FakeWandb(reachable=False)
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    if where == "environment":
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    else:
        (tmp_path / "netrc").write_text("machine wandb.example login user password " + "k" * 40)
        (tmp_path / "netrc").chmod(0o600)
    run_folder(tmp_path, log="wandb").finish("finished")
    assert [start.get("mode") for start in wandb.starts] == [None, "offline"]
    assert wandb.starts[0]["settings"].init_timeout <= 30
    assert "cannot be reached (no such host): logging offline" in capsys.readouterr().out


def test_a_failing_log_does_not_stop_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_key: None, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb = FakeWandb(failing_step=1)
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    opened = run_folder(tmp_path, log="wandb")
    for step in range(3):
        opened.step({**STEP, "step": step})
    opened.finish("finished")
    assert [step for step, _ in wandb.logged] == [0]
    assert len(metrics(tmp_path / "run")) == 3
    assert capsys.readouterr().out.count("stopped logging (disk full)") == 1


@pytest.mark.parametrize("end", ("hangs", "fails"))
def test_the_end_of_a_run_does_not_hang_on_a_lost_connection(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_key: None, capsys: pytest.CaptureFixture[str], end: str
) -> None:
    wandb = FakeWandb()

    def finish(exit_code: int) -> None:
        if end == "fails":
            raise ConnectionError("connection lost")
        time.sleep(5)
        wandb.ended = exit_code

    monkeypatch.setattr(wandb, "finish", finish)
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    monkeypatch.setattr("speedrun.run.wandb_run.FINISH", 0.2)
    opened = run_folder(tmp_path, log="wandb")
    opened.finish("finished")
    assert read(tmp_path / "run", "summary.json")["status"] == "finished" and wandb.ended is None
    why = "connection lost" if end == "fails" else "no answer in 0.2 s"
    assert f"did not get the end of this run ({why})" in capsys.readouterr().out


def test_without_wandb_the_folder_is_all_there_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]
    run_folder(tmp_path, log="wandb").step(STEP)
    assert "wandb is not installed" in capsys.readouterr().out
    assert len(metrics(tmp_path / "run")) == 1


def save(run: Path, opened: RunFolder, step: int) -> None:
    """As much of a checkpoint as a start looks at."""
    path = run / "checkpoints" / name_of(step)
    path.mkdir(parents=True)
    (path / "index.json").write_text(json.dumps({"run": {"history": opened.history.about()}}))


def go_on(out: Path, step: int, last: int) -> RunFolder:
    """From that checkpoint; then the steps up to the last one."""
    path = out / "run/checkpoints" / name_of(step)
    resumed = Resumed(path, Index(step, {}, {}, {}, {}), step)
    opened = RunFolder(out / "run", small(out=str(out), log="wandb"), launch_of("single"), "tiny", "abc", 1, resumed)
    opened.open()
    for number in range(step + 1, last + 1):
        opened.step({**STEP, "step": number})
    return opened


@pytest.mark.parametrize("online", (True, False))
def test_a_run_that_goes_on_is_the_same_run_there_and_no_step_goes_backwards(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_key: None, online: bool
) -> None:
    """Killed after step 7 with a checkpoint of step 4; again after step 5, before the next checkpoint."""
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    if online:
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    opened = run_folder(tmp_path, log="wandb")
    for step in range(8):
        opened.step({**STEP, "step": step})
    save(tmp_path / "run", opened, 4)
    go_on(tmp_path, 4, 5)
    go_on(tmp_path, 4, 9).finish("finished")
    assert [step for step, _ in wandb.logged] == [*range(10)]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [*range(10)]
    history = read(tmp_path / "run", "history.json")
    assert {(start["id"], start["resume"]) for start in wandb.starts} == {(history["wandb"]["id"], "allow")}
    assert [start.get("mode") for start in wandb.starts] == [None if online else "offline"] * 3


def test_going_back_is_another_run_there_and_names_its_parent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_key: None
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    opened = run_folder(tmp_path, log="wandb")
    for step in range(9):
        opened.step({**STEP, "step": step})
    for step in (4, 8):
        save(tmp_path / "run", opened, step)
    opened.finish("finished")
    back = go_on(tmp_path, 4, 6)
    save(tmp_path / "run", back, 6)
    back.finish("finished")
    go_on(tmp_path, 6, 7).finish("finished")
    first, second, third = wandb.starts
    assert first["id"] != second["id"] == third["id"]
    assert first["config"]["parent"] is None
    assert second["config"]["parent"] == third["config"]["parent"] == {"id": first["id"], "step": 4}
    assert [step for step, _ in wandb.logged] == [*range(9), 5, 6, 7]
    assert opened.history.id == first["id"] and back.history.id == second["id"]


def test_an_id_of_the_environment_is_kept_for_the_first_history_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_key: None
) -> None:
    """A sweep sets it."""
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    monkeypatch.setenv("WANDB_RUN_ID", "sweep1")
    opened = run_folder(tmp_path, log="wandb")
    for step in range(5):
        opened.step({**STEP, "step": step})
    save(tmp_path / "run", opened, 2)
    save(tmp_path / "run", opened, 4)
    go_on(tmp_path, 4, 5)
    go_on(tmp_path, 2, 3)
    assert [start["id"] for start in wandb.starts[:2]] == ["sweep1"] * 2 and wandb.starts[2]["id"] != "sweep1"


def test_curves_that_begin_later_begin_a_run_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_key: None
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)  # type: ignore[arg-type]
    opened = run_folder(tmp_path)
    for step in range(6):
        opened.step({**STEP, "step": step})
    save(tmp_path / "run", opened, 4)
    go_on(tmp_path, 4, 7)
    assert [step for step, _ in wandb.logged] == [5, 6, 7]


def records(path: Path) -> list[Any]:
    """Of a .wandb file: LevelDB's log format in blocks of 32 KiB after seven bytes, a protobuf message a record."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


@pytest.mark.slow
def test_the_offline_store_holds_two_parts_of_one_run_and_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_key: None
) -> None:
    pytest.importorskip("wandb.proto.wandb_internal_pb2")
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    opened = run_folder(tmp_path, log="wandb")
    for step in range(6):
        opened.step({**STEP, "step": step})
    for step in (2, 4):
        save(tmp_path / "run", opened, step)
    opened.finish("interrupted")
    time.sleep(1.1)  # wandb names a part's folder by its id and second
    go_on(tmp_path, 4, 7).finish("interrupted")
    back = go_on(tmp_path, 2, 3)
    back.finish("finished")
    stored = []
    for file in sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb")):
        content = records(file)
        (run,) = (record.run for record in content if record.WhichOneof("record_type") == "run")
        parent = next(json.loads(entry.value_json) for entry in run.config.update if entry.key == "parent")
        steps = [record.history.step.num for record in content if record.WhichOneof("record_type") == "history"]
        values = [
            float(item.value_json)
            for record in content
            for item in record.history.item
            if "val_loss" in (item.key, *item.nested_key)
        ]
        stored.append((run.run_id, parent, steps))
        assert values == [STEP["val_loss"]] * len(steps)
    # Not by the names of the files: two runs that begin in one second are named in the order of their ids.
    parts = {tuple(steps): (run_id, parent) for run_id, parent, steps in stored}
    first, forked = opened.history.id, {"id": opened.history.id, "step": 2}
    assert parts == {(0, 1, 2, 3, 4, 5): (first, None), (6, 7): (first, None), (3,): (back.history.id, forked)}
    assert len(stored) == 3 and first != back.history.id
