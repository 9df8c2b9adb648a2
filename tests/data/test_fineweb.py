"""The download of FineWeb from a hub on this machine: what it asks for, and every way in which it can go wrong."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.file_download
import numpy as np
import pytest

from shardrun.__main__ import main
from speedrun.data import fineweb
from speedrun.data.fineweb import DownloadError, fetch
from speedrun.data.shards import write_tokens
from tests.data.hub import COMMIT, Hub

VAL, FIRST, SECOND = "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Three small shards, in the order in which the hub lists them: sorted, so validation comes last."""
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for name in (FIRST, SECOND, VAL):
        write_tokens(folder / name, rng.integers(0, 50257, int(rng.integers(2000, 3000))))
    return {name: (folder / name).read_bytes() for name in (FIRST, SECOND, VAL)}


@pytest.fixture
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    # The client hands over whole pieces of 10 MB; in small ones a file of 5 kB can break off in its middle too.
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 16)
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)
    with Hub(dict(files)) as hub:
        yield hub


def fetched(hub: Hub, folder: Path, shards: int = 1) -> list[str]:
    lines: list[str] = []
    fetch(folder, shards, lines.append, hub.url)
    return lines


def failure(hub: Hub, folder: Path, shards: int = 1) -> str:
    """The sentence with which a download fails."""
    with pytest.raises(DownloadError) as error:
        fetch(folder, shards, endpoint=hub.url)
    assert "\n" not in str(error.value)
    return str(error.value)


def part_of(folder: Path, name: str) -> Path:
    (part,) = folder.glob(f"{name}.*.part")
    return part


def test_fetches_each_byte_once(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "secret"
    monkeypatch.setenv("HF_TOKEN", "secret")
    lines = fetched(hub, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: files[name] for name in (VAL, FIRST)}
    assert [re.sub(":.*", "", line) for line in lines] == [f"[1/2] {VAL}", f"[2/2] {FIRST}"]
    asked = [(request.server, request.method, request.path.partition("?")[0]) for request in hub.requests]
    repository = "kjj0/fineweb10B-gpt2"
    assert asked == [
        ("hub", "GET", f"/api/datasets/{repository}/revision/main"),
        ("hub", "GET", f"/datasets/{repository}/resolve/{COMMIT}/{VAL}"),
        ("bytes", "GET", f"/{VAL}"),
        ("hub", "GET", f"/datasets/{repository}/resolve/{COMMIT}/{FIRST}"),
        ("bytes", "GET", f"/{FIRST}"),
    ]
    # The token is for the hub and for nobody else.
    assert {(request.server, request.token) for request in hub.requests} == {("hub", "Bearer secret"), ("bytes", None)}

    hub.requests.clear()
    done = fetch(tmp_path, 2, lines.append, hub.url)
    assert [request.path for request in hub.of_bytes()] == [f"/{SECOND}"]
    assert done.fetched_bytes == len(files[SECOND]) and [file.name for file in done.files] == [VAL, FIRST, SECOND]


@pytest.mark.parametrize("seed", range(4))
def test_a_connection_cut_at_any_byte_is_resumed_by_the_next_run(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    size = len(files[VAL])
    random = np.random.default_rng(seed).integers(0, size, 3).tolist()
    for cut in (*random, *[(0, 1), (15, 16), (1023, 1024), (1025, size - 1)][seed]):
        folder = tmp_path / str(cut)
        hub.cuts = [cut, *[0] * 6]  # and nothing more comes, until the client gives up
        message = failure(hub, folder)
        assert message.startswith(f"{VAL} of kjj0/fineweb10B-gpt2 could not be fetched") and "goes on" in message
        kept = part_of(folder, VAL).read_bytes()
        assert kept == files[VAL][: cut // 16 * 16] and not (folder / VAL).exists()
        hub.cuts, hub.requests = [], []
        fetched(hub, folder)
        assert (folder / VAL).read_bytes() == files[VAL]
        assert hub.of_bytes()[0].range == (f"bytes={len(kept)}-" if kept else None)
        assert not list(folder.glob("*.part"))


def test_what_a_killed_run_left_is_gone_on_with(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    """A process may end after any byte that it has written."""
    fetched(hub, tmp_path)
    rng = np.random.default_rng(1)
    for have in (0, 1, 2, 1024, len(files[VAL]) - 1, len(files[VAL]), *rng.integers(0, len(files[VAL]), 20).tolist()):
        (tmp_path / VAL).unlink()
        [entry] = [file for file in fineweb._listing(hub.url)[1] if file.name == VAL]
        fineweb._part(tmp_path, entry).write_bytes(files[VAL][:have])
        hub.requests.clear()
        fetched(hub, tmp_path)
        assert (tmp_path / VAL).read_bytes() == files[VAL]
        assert [request.range for request in hub.of_bytes()] == (
            [] if have == len(files[VAL]) else [f"bytes={have}-" if have else None]
        )


def test_a_server_that_ignores_ranges(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.cuts = [2000, *[0] * 6]
    failure(hub, tmp_path)
    hub.ranges, hub.cuts = False, []
    fetched(hub, tmp_path)
    assert (tmp_path / VAL).read_bytes() == files[VAL]


def test_short_interruptions_are_bridged_within_a_run(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.cuts = [100, 0, 1000, 0, 0, 7]
    fetched(hub, tmp_path)
    assert (tmp_path / VAL).read_bytes() == files[VAL]
    assert hub.of_bytes()[-2].range == f"bytes={96 + 992}-"


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, "refused by the hub .status 403.: the token .* is wrong"),
        (404, "is not there .status 404."),
        (500, "answered with status 500: wait a little and run the same command again"),
    ],
)
def test_what_the_hub_refuses(hub: Hub, tmp_path: Path, status: int, message: str) -> None:
    hub.listing_status = status
    assert re.search(f"The data set kjj0/fineweb10B-gpt2 .*{message}", failure(hub, tmp_path))
    hub.listing_status, hub.file_status = 200, status
    assert re.search(f"{VAL} of kjj0/fineweb10B-gpt2 .*{message}", failure(hub, tmp_path))


@pytest.mark.parametrize("token", [None, "expired"])
def test_a_token_that_is_missing_or_wrong(
    hub: Hub, tmp_path: Path, token: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.token = "secret"
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert "(status 401): the token of HF_TOKEN or `hf auth login` is wrong" in failure(hub, tmp_path)


def test_other_bytes_of_the_same_length(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.sent = {VAL: files[VAL][:-1] + bytes([files[VAL][-1] ^ 1])}
    message = failure(hub, tmp_path)
    assert re.search(f"not the {VAL} that the hub lists: its SHA-256 is [0-9a-f]{{64}} and not [0-9a-f]{{64}}", message)
    assert not list(tmp_path.iterdir())
    hub.sent = {}
    fetched(hub, tmp_path)
    assert (tmp_path / VAL).read_bytes() == files[VAL]


def test_a_file_of_another_length(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    size = len(files[VAL])
    for sent in (files[VAL][:3000], files[VAL] + b"more"):
        hub.sent = {VAL: sent}
        assert f"should be of size {size} but has size {len(sent)}" in failure(hub, tmp_path)
    # What was too long is thrown away; what is too short cannot be gone on with, and goes at the next attempt.
    hub.sent = {VAL: files[VAL][:3000]}
    failure(hub, tmp_path)
    assert "status 416" in failure(hub, tmp_path) and not list(tmp_path.iterdir())
    hub.sent = {}
    fetched(hub, tmp_path)


def test_a_file_of_the_hub_that_is_no_shard(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.files[VAL] = files[VAL][:-2]
    count = (len(files[VAL]) - 1024) // 2
    assert re.search(
        f"hub's {VAL} is no shard of tokens: .* holds {count - 1} tokens but its header promises {count}",
        failure(hub, tmp_path),
    )
    assert not list(tmp_path.iterdir())


def test_a_file_of_ones_own_is_left_alone(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    own = files[VAL][:-1]
    (tmp_path / VAL).write_bytes(own)
    message = failure(hub, tmp_path)
    assert f"it has {len(own):,} bytes and not {len(own) + 1:,}; delete it to have it fetched again" in message
    assert (tmp_path / VAL).read_bytes() == own


def test_a_disk_with_too_little_room(
    hub: Hub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = len(files[VAL]) + len(files[FIRST])
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(needed - 1))
    assert re.search(r"has 0.0 GB free and the download needs 0.0 GB more: make room", failure(hub, tmp_path))
    assert not hub.of_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(needed))
    fetched(hub, tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's /dev/full stands for the full disk")
def test_a_disk_that_fills_up(hub: Hub, tmp_path: Path) -> None:
    [entry] = [file for file in fineweb._listing(hub.url)[1] if file.name == VAL]
    fineweb._part(tmp_path, entry).symlink_to("/dev/full")
    message = failure(hub, tmp_path)
    assert message == (
        f"{VAL} of kjj0/fineweb10B-gpt2 does not fit, the disk is full (0 bytes of it are kept): make room and run the "
        "same command again, it goes on where it stopped."
    )


def test_a_folder_that_cannot_be(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in failure(hub, tmp_path / "file" / "folder")


def test_no_network(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"  # nobody listens there
    with pytest.raises(DownloadError, match=r"^The data set .* could not be fetched, .*refused\): connect, and run"):
        fetch(tmp_path, 1, endpoint=url)
    with pytest.raises(DownloadError, match="^GPT-2's tokenizer .* could not be fetched, .*refused"):
        fineweb.gpt2_tokenizer(url)


def test_the_page_of_a_hotel(hub: Hub, tmp_path: Path) -> None:
    hub.listing = b"<html>Welcome! Please log in.</html>"
    assert "the answer is not the hub's: the login page of a network, or a proxy's?" in failure(hub, tmp_path)


def test_more_shards_than_there_are(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds 2 training shards and 1 for validation, but 3 and at least 1"):
        fetch(tmp_path, 3, endpoint=hub.url)
    with pytest.raises(ValueError, match="0 training shards were asked for"):
        fetch(tmp_path, 0, endpoint=hub.url)


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"^huggingface_hub is not installed, .*: pip install 'shardrun\[data\]'\.$"):
        fetch(tmp_path, 1)


def test_the_tokenizer_is_fetched_once(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert fineweb.cached_gpt2_tokenizer() is None
    assert re.search("tokenizer .* is not there .status 404", _tokenizer_failure(hub.url))
    hub.files["tokenizer.json"] = b"{}"
    path = fineweb.gpt2_tokenizer(hub.url)
    assert path.read_bytes() == b"{}"
    assert {request.path for request in hub.requests if "resolve" in request.path} == {
        "/openai-community/gpt2/resolve/main/tokenizer.json"
    }
    hub.requests.clear()
    assert fineweb.gpt2_tokenizer(hub.url) == fineweb.cached_gpt2_tokenizer() == path
    assert not hub.requests


def _tokenizer_failure(url: str) -> str:
    with pytest.raises(DownloadError) as error:
        fineweb.gpt2_tokenizer(url)
    return str(error.value)


def test_the_command_fails_in_one_line(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    hub.listing_status = 404
    with pytest.raises(SystemExit, match="2"):
        main(["data", "fineweb", "--out", str(tmp_path / "x"), "--json"])
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert output.err.startswith("shardrun: error: The data set kjj0/fineweb10B-gpt2 is not there (status 404)")


@pytest.mark.slow
def test_a_killed_command_is_gone_on_with(files: dict[str, bytes], tmp_path: Path) -> None:
    """The command itself, killed in the middle of a file and started again."""
    command = [sys.executable, "-m", "shardrun", "data", "fineweb", "--shards", "1", "--out", "x", "--json"]
    root = str(Path(__file__).parents[2])
    with Hub(dict(files)) as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "t",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": root,
        }
        # Pieces of 10 MB are the smallest that reach the disk: a shard of 24 MB, of which 21 MB come at once.
        tokens = np.random.default_rng(0).integers(0, 50257, 12_000_000)
        write_tokens(tmp_path / "large.bin", tokens)
        hub.files[VAL] = (tmp_path / "large.bin").read_bytes()
        hub.cuts = [21_000_000, *[0] * 6]
        running = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size for path in (tmp_path / "x").glob("*.part")):
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        running.wait()
        have = part_of(tmp_path / "x", VAL).stat().st_size
        assert 0 < have < len(hub.files[VAL]) and not (tmp_path / "x" / VAL).exists()
        hub.cuts, hub.requests = [], []
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert hub.of_bytes()[0].range == f"bytes={have}-"
        assert (tmp_path / "x" / VAL).read_bytes() == hub.files[VAL]
        content = json.loads(done.stdout)
        assert content["fetched_bytes"] == len(hub.files[VAL]) - have + len(files[FIRST])
        assert [file["name"] for file in content["files"]] == [VAL, FIRST] and content["commit"] == COMMIT
