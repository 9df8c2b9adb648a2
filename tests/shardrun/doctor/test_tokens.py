"""Tokens are found, judged by their form, and never shown."""

import os
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardrun.doctor import tokens
from shardrun.doctor.report import Finding, Report

GOOD_HF = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5vX7zA9cE1gI3k"
GOOD_WANDB = "0123456789abcdef0123456789abcdef01234567"
NEW_WANDB = "wandb_v1_" + "Ab3" * 25 + "xy"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without tokens."""
    for name in (*tokens.HF_VARIABLES, tokens.WANDB_VARIABLE, "HF_TOKEN_PATH", "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "hf").mkdir()
    return tmp_path


def hugging_face() -> Finding:
    (line,) = tokens.hugging_face()
    return line


def weights_and_biases() -> Finding:
    (line,) = tokens.weights_and_biases()
    return line


def test_no_tokens_are_no_mistake() -> None:
    assert hugging_face().status == weights_and_biases().status == "ok"
    assert "none" in hugging_face().said and tokens.secrets() == []


def test_tokens_of_valid_form(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "hf" / "token").write_text(GOOD_HF + "\n")
    netrc = home / ".netrc"
    netrc.write_text(f"machine api.wandb.ai login user password {GOOD_WANDB}\n")
    netrc.chmod(0o600)
    for line in (hugging_face(), weights_and_biases()):
        assert line.status == "ok" and str(home) in line.said and "valid form" in line.said
    assert {GOOD_HF, GOOD_WANDB} <= set(tokens.secrets())
    for variable, token in (("HF_TOKEN", GOOD_HF), ("WANDB_API_KEY", "local-" + GOOD_WANDB)):
        monkeypatch.setenv(variable, token)
    for variable, line in (("HF_TOKEN", hugging_face()), ("WANDB_API_KEY", weights_and_biases())):
        assert line.status == "ok" and line.said.startswith(variable)


@pytest.mark.parametrize(
    ("token", "wrong"),
    [
        (f'"{GOOD_HF}"', "quotation marks"),
        (GOOD_HF[:10] + " " + GOOD_HF[10:], "spaces or line breaks"),
        (GOOD_HF[:12], "this has 12 characters"),
        (GOOD_WANDB, "begins with hf_"),
        ("my password", "spaces"),
    ],
)
@pytest.mark.parametrize("variable", ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", ""))
def test_a_hugging_face_token_of_wrong_form(
    home: Path, monkeypatch: pytest.MonkeyPatch, variable: str, token: str, wrong: str
) -> None:
    if variable:
        monkeypatch.setenv(variable, token)
    else:
        (home / "hf" / "token").write_text(token)
    line = hugging_face()
    assert line.status == "failure" and wrong in line.said and line.fix.endswith("hf auth login")
    assert (variable or str(home)) in line.said and variable in line.fix


@pytest.mark.parametrize(
    ("key", "wrong"),
    [(GOOD_HF, "a Hugging Face token"), (GOOD_WANDB[:30], "this has 30 characters"), (f"'{GOOD_WANDB}'", "quotation")],
)
def test_a_wandb_key_of_wrong_form(monkeypatch: pytest.MonkeyPatch, key: str, wrong: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    line = weights_and_biases()
    assert line.status == "warning" and wrong in line.said and "wandb login" in line.fix


def test_a_new_wandb_key_needs_a_wandb_that_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", NEW_WANDB)
    for version, status in (("0.22.2", "warning"), ("0.22.3", "ok"), ("1.0", "ok")):
        with mock.patch("importlib.metadata.version", return_value=version):
            assert weights_and_biases().status == status


def test_a_broken_netrc_is_not_quoted(home: Path) -> None:
    (home / ".netrc").write_text(f"machine api.wandb.ai login user pasword {GOOD_WANDB}\n")
    line = weights_and_biases()
    assert GOOD_WANDB not in line.said + line.fix and "none" in line.said


def own_words() -> str:
    """What the report shows of tokens that look right, and that do not, less the tokens."""
    shown = ""
    for token in ("hf_" + "x" * 34, "y z" * 9, "0" * 40):
        with mock.patch.dict(os.environ, {"HF_TOKEN": token, "WANDB_API_KEY": token}):
            report = Report(silent=True)
            report.hide(tokens.secrets())
            report.take(tokens.hugging_face)
            report.take(tokens.weights_and_biases)
            shown += report.as_json()
    return shown


OWN_WORDS = own_words()

token_like = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=12, max_size=90).filter(
    # Not what the report says of itself: a token that is "Hugging Face" would be found in its own line's name.
    lambda text: len(text.strip()) >= 12 and text.strip() not in OWN_WORDS
)


@settings(max_examples=60, deadline=None)
@given(hf=token_like | token_like.map(lambda t: "hf_" + t), wandb=token_like, in_files=st.booleans())
def test_no_token_is_ever_in_a_line(
    tmp_path_factory: pytest.TempPathFactory, hf: str, wandb: str, in_files: bool
) -> None:
    folder = tmp_path_factory.mktemp("home")
    (folder / "token").write_text(hf, encoding="utf-8")
    (folder / "netrc").write_text(f"machine api.wandb.ai login user password {wandb}\n", encoding="utf-8")
    values = {"HF_TOKEN": hf, "WANDB_API_KEY": wandb}
    if in_files:
        values = {"HF_TOKEN_PATH": str(folder / "token"), "NETRC": str(folder / "netrc")}
    try:
        patch = mock.patch.dict(os.environ, values)
        patch.start()
    except UnicodeEncodeError:
        return  # no environment can hold it
    try:
        report = Report(silent=True)
        report.hide(tokens.secrets())
        report.take(tokens.hugging_face)
        report.take(tokens.weights_and_biases)
        shown = report.as_json() + "".join(line.said + line.fix for _, line in report.lines)
        assert hf not in shown and hf.strip() not in shown and wandb not in shown and wandb.strip() not in shown
    finally:
        patch.stop()


def test_a_token_that_something_else_prints_is_blotted_out(capsys: pytest.CaptureFixture[str]) -> None:
    def leaks(token: str):  # type: ignore[no-untyped-def]
        yield Finding("leak", "ok", f"the header was {token}", f"curl -H {token}")
        raise RuntimeError(f"denied: {token}")

    for token, known in ((GOOD_WANDB, [GOOD_WANDB]), (GOOD_HF, [])):
        report = Report()
        report.hide(known)
        report.take(leaks, token)
        assert [line.status for _, line in report.lines] == ["ok", "failure"]
        assert token not in report.as_json() + capsys.readouterr().out
        assert "denied: ***" in report.lines[1][1].said
