"""The trainer's command line: presets, fields, and what a person sees after a slip."""

import pytest

from speedrun.presets import PRESETS
from speedrun.run.command_line import parse


def test_a_preset_with_single_fields_replaced() -> None:
    preset, config = parse(["gpt2", "--steps", "7", "--data.global-batch", "8", "--model.no-bias"])
    default = PRESETS["gpt2"][1]
    assert (preset, config.steps, config.data.global_batch, config.model.bias) == ("gpt2", 7, 8, False)
    assert config.optimizer == default.optimizer and config.model.width == default.model.width


def test_tiny_where_no_preset_is_named() -> None:
    assert parse([]) == ("tiny", PRESETS["tiny"][1])
    assert parse(["--steps", "3"])[1].steps == 3


def test_an_unknown_preset_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="no preset 'tony'; there are tiny, gpt2, modern, speedrun, speedrun_24gb"):
        parse(["tony", "--steps", "3"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.globalbatch", "3"], ["--data.globalbatch", "--data.global-batch"]),
        (["speedrun", "--optimizer.moun-lr", "0.1"], ["--optimizer.moun-lr", "--optimizer.muon-lr"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--log", "tensorboard"], ["--log", "tensorboard", "wandb"]),
    ],
)
def test_a_wrong_field_is_shown_with_the_nearest_one(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse(arguments)
    shown = capsys.readouterr()
    assert end.value.code == 2
    assert all(word in shown.out + shown.err for word in words)


def test_a_wrong_field_is_shown_by_one_rank_of_a_machine(
    tmp_path: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes, left = 0, []
    for rank in ("0", "1"):
        folder = tmp_path / "attempt_0" / rank  # type: ignore[operator]
        folder.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        with pytest.raises(SystemExit):
            parse(["--stepz", "3"])
        boxes += "--stepz" in "".join(capsys.readouterr())
        left += [rank for file in folder.glob("error.json") if "command line is wrong" in file.read_text()]
    assert boxes == 1 and left == ["0"]


def test_help_lists_the_presets_and_the_defaults_of_the_chosen_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["speedrun", "--help"])
    shown = capsys.readouterr().out
    assert not end.value.code
    assert all(f"{preset}: {about[:20]}" in shown for preset, (about, _) in PRESETS.items())
    assert "accelerate launch --config_file" in shown and "(default: 3000)" in shown
