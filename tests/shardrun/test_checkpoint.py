"""shardrun checkpoint: what is in one, whether it is intact, its weights for the hub."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from safetensors.torch import load_file

from shardrun.__main__ import main
from shardrun.checkpoint.export import SHARD_BYTES, export, model_card
from shardrun.checkpoint.tokens import tokens_of
from speedrun.config import CheckpointConfig
from speedrun.data import open_data
from speedrun.data.vocabulary import Vocabulary, write_sidecar
from strategies.checkpoint.format import read_index
from strategies.checkpoint.shards import Shards
from tests.ranks import RankPool
from tests.speedrun.runs import metrics, small, train_here
from tests.strategies.checkpoint.damage import flip, spoil

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def folder(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps under zero3 on 2 ranks, saved at its end."""
    out = tmp_path_factory.mktemp("runs")
    ranks.run(2, train_here, "zero3", small(out=str(out), checkpoint=CheckpointConfig(every=4)))
    return out / "run"


def shardrun(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["checkpoint", *map(str, arguments)])
    output = capsys.readouterr()
    return end.value.code, output.out, output.err  # type: ignore[return-value]


def test_inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, shown, _ = shardrun(capsys, "inspect", folder)
    assert status == 0 and "step 4, saved by zero3 on 2 ranks in fp32" in shown and "step_00000004" in shown
    _, shown, _ = shardrun(capsys, "inspect", folder / "checkpoints", "--json")
    content: dict[str, Any] = json.loads(shown)
    assert content["schema"] == 1 and content["step"] == 4 and len(content["files"]) == 2
    parameters = json.loads((folder / "config.json").read_text())["parameters"]
    assert content["kinds"]["weight"]["elements"] == parameters == content["run"]["parameters"]
    assert content["run"]["metrics"]["val_loss"] == metrics(folder)[-1]["val_loss"]


def test_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = folder / "checkpoints/step_00000004"
    (checkpoint / "evil.pt").touch()
    status, shown, _ = shardrun(capsys, "verify", folder)
    assert status == 0 and "intact, 2 files" in shown and "evil.pt is no part of it" in shown
    (checkpoint / "evil.pt").unlink()
    shard = checkpoint / "rank_001.safetensors"
    flip(shard, 7000)
    try:
        status, shown, _ = shardrun(capsys, "verify", folder)
        assert status == 1 and f"{shard} is damaged" in shown
        status, shown, _ = shardrun(capsys, "verify", folder, "--json")
        content = json.loads(shown)
        assert status == 1 and not content["intact"] and str(shard) in content["error"]
        status, _, said = shardrun(capsys, "export", folder, "--out", folder / "hub")
        assert status == 2 and f"{shard} is damaged" in said and not (folder / "hub").exists()
    finally:
        flip(shard, 7000)
    status, _, said = shardrun(capsys, "verify", folder / "nowhere")
    assert status == 2 and "there is no checkpoint in" in said


def test_a_checkpoint_that_is_not_finite_is_said_to_be_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an older version saved it: intact, every hash as written."""
    checkpoint = tmp_path / "step_00000004"
    shutil.copytree(folder / "checkpoints/step_00000004", checkpoint)
    spoil(checkpoint, "weight/embed.weight")
    words = "the weight embed.weight is not finite"
    status, shown, _ = shardrun(capsys, "verify", checkpoint)
    assert status == 1 and "intact, 2 files" in shown and f"but {words}: no run can go on from it" in shown
    status, shown, _ = shardrun(capsys, "verify", checkpoint, "--json")
    assert status == 1 and json.loads(shown)["intact"] and json.loads(shown)["not_finite"] == words
    status, shown, _ = shardrun(capsys, "inspect", checkpoint)
    assert status == 0 and f"{words}: no run can go on from it" in shown
    status, _, said = shardrun(capsys, "export", checkpoint, "--out", tmp_path / "hub")
    assert status == 2 and f"is not exported: {words}; export an earlier" in said and said.count("\n") == 1
    assert not (tmp_path / "hub").exists()
    assert json.loads(shardrun(capsys, "inspect", folder, "--json")[1])["not_finite"] is None


def test_export_is_the_model_and_the_card_loads_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card's own code, run as it stands, gives a model whose validation loss is the run's."""
    out = tmp_path / "my-model"
    status, shown, _ = shardrun(capsys, "export", folder, "--out", out, "--json")
    assert status == 0 and set(json.loads(shown)["files"]) == {"README.md", "config.json", "model.safetensors"}
    card = (out / "README.md").read_text()
    last = metrics(folder)[-1]
    assert card.startswith("---\nlibrary_name: shardrun") and f"{last['val_loss']:.4f}" in card
    assert "a token is a byte of UTF-8 text" in card and "text-generation" not in card
    assert "256 stands before each document" in json.loads(shown)["tokens"]
    assert "zero3 on 2 ranks, fp32" in card and f"{last['tokens']:,}" in card
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    config = small()
    data = open_data(config.data, config.model.vocab_size, config.seed)
    with torch.no_grad():
        loss = names["model"](*data.validation(0, data.validation_rows)).item()
    assert loss == pytest.approx(last["val_loss"], rel=1e-5)
    status, _, said = shardrun(capsys, "export", folder, "--out", out)
    assert status == 2 and "is there already" in said


def test_export_carries_its_tokenizer(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the data's is the one that made the tokens, from whatever folder; else the card says what is missing."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "tokenizer.json").write_bytes(b"{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    write_sidecar(data, Vocabulary(300, 299, digest))
    index = read_index(next((folder / "checkpoints").glob("step_*")))
    index.run["document_start"] = 299
    index.run["config"]["data"]["source"] = "data"
    monkeypatch.chdir(tmp_path)
    known = {"bytes": False, "tokenizer_sha256": digest, "folder": str(data)}
    for tokens in (known, None):  # a checkpoint of an earlier version does not say it
        index.run["tokens"] = tokens
        found = tokens_of(index)
        assert found.tokenizer == b"{}" and "is the tokenizer that made the tokens. Token 299 stands" in found.words
        assert "pipeline_tag: text-generation\n" in model_card(index, "hub", found)
    index.run["tokens"] = known
    (data / "tokenizer.json").write_bytes(b"{ }")
    assert tokens_of(index).tokenizer is None and "is not the tokenizer that made" in tokens_of(index).words
    (data / "tokenizer.json").unlink()
    found = tokens_of(index)
    assert found.tokenizer is None and digest in found.words and "put it here" in found.words
    assert "text-generation" not in model_card(index, "hub", found)
    index.run["tokens"], index.run["document_start"] = None, 50256
    (data / "tokens.json").unlink()
    monkeypatch.setattr("speedrun.data.fineweb.cached_gpt2_tokenizer", lambda: None)
    assert "The tokens are GPT-2's (openai-community/gpt2)" in tokens_of(index).words


def test_large_weights_go_into_several_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = folder / "checkpoints/step_00000004"
    assert SHARD_BYTES == 5 * 10**9
    give, alive, most = Shards.whole, WeakSet[torch.Tensor](), 0

    def look(*arguments: Any) -> torch.Tensor:
        nonlocal most
        tensor = give(*arguments)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(Shards, "whole", look)
    export(checkpoint, read_index(checkpoint), tmp_path / "one")
    assert most <= 2  # one is written, the next one is read
    monkeypatch.setattr("shardrun.checkpoint.export.SHARD_BYTES", 60_000)
    export(checkpoint, read_index(checkpoint), tmp_path / "many")
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one/model.safetensors")
    files = {file: load_file(tmp_path / "many" / file) for file in set(index["weight_map"].values())}
    assert len(files) > 2 and index["weight_map"].keys() == whole.keys()
    assert all(torch.equal(files[file][name], whole[name]) for name, file in index["weight_map"].items())
    assert index["metadata"]["total_size"] == sum(4 * weight.numel() for weight in whole.values())
