"""Tokens of Hugging Face and Weights & Biases: whether there is one and whether it looks like one. Never shown."""

import netrc
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

from shardrun.doctor import shell
from shardrun.doctor.report import Finding

HF_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
WANDB_VARIABLE = "WANDB_API_KEY"
OLD_WANDB_KEY = 40
"""Characters of a W&B key until 2025; new ones have 86 and need wandb 0.22.3."""


def secrets() -> list[str]:
    """Every token there is, for the report to keep out of what it shows."""
    found = [os.environ.get(name, "") for name in (*HF_VARIABLES, WANDB_VARIABLE)]
    found += [value for _, value in (_hf_from_file(), _wandb_from_file()) if value]
    return [part for value in found for part in {value, value.strip(), value.strip("\"' \n")} if len(part) >= 4]


def hugging_face() -> Iterator[Finding]:
    """In the environment first, then where `hf auth login` keeps it, as the library looks for it."""
    name = "Hugging Face token"
    variable = next((v for v in HF_VARIABLES if os.environ.get(v)), "")
    where, token = (variable, os.environ[variable]) if variable else _hf_from_file()
    if token is None:
        yield Finding(name, "ok", "none; public data needs none (`hf auth login` stores one)")
        return
    wrong = "" if re.fullmatch(r"(hf_|api_)[A-Za-z0-9_.\-]{20,}", token.strip()) else _wrong(token, "begins with hf_")
    if wrong:  # even public files are refused to a wrong token
        yield Finding(name, "failure", f"{where} {wrong}", _login(variable, "hf auth login"))
    else:
        yield Finding(name, "ok", f"{where} has one of valid form")


def weights_and_biases() -> Iterator[Finding]:
    """In the environment first, then where `wandb login` keeps it. A run goes on offline without."""
    name = "W&B key"
    value = os.environ.get(WANDB_VARIABLE)
    where, key = (WANDB_VARIABLE, value) if value else _wandb_from_file()
    if key is None:
        yield Finding(
            name, "ok", "none; runs log to their folder, and `--log wandb` offline (`wandb login` stores one)"
        )
        return
    variable = WANDB_VARIABLE if value else ""
    if key.startswith("hf_"):
        said = f"{where} holds a Hugging Face token"
        yield Finding(name, "warning", said, _login(variable, "wandb login --relogin"))
    elif not re.fullmatch(rf"(\w+-)?\w{{{OLD_WANDB_KEY},}}", key):
        wrong = _wrong(key, f"has {OLD_WANDB_KEY} characters or more, letters and digits")
        said = f"{where} {wrong}; a run with `--log wandb` would go on offline"
        yield Finding(name, "warning", said, _login(variable, "wandb login --relogin"))
    elif len(key) > OLD_WANDB_KEY and not _wandb_takes_long_keys():
        said = f"{where} has a new, longer one, which the installed wandb does not know"
        yield Finding(name, "warning", said, "python -m pip install 'wandb>=0.22.3'")
    else:
        yield Finding(name, "ok", f"{where} has one of valid form")


def _wrong(token: str, form: str) -> str:
    """What is wrong with a token, without any of its characters."""
    if token.strip()[:1] in ("'", '"'):
        return "has quotation marks around the token"
    if re.search(r"\s", token.strip()):
        return "has spaces or line breaks within the token"
    return f"does not look like a token: one {form}; this has {len(token.strip())} characters"


def _login(variable: str, command: str) -> str:
    """A variable goes before what is stored, so it has to go first."""
    return (shell.unset([variable], shell.current()) + "\n" if variable else "") + command


def _hf_from_file() -> tuple[str, str | None]:
    """Where `hf auth login` keeps the token, and the token; None where there is none."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", os.path.join(cache, "huggingface"))
    path = Path(os.path.expanduser(os.environ.get("HF_TOKEN_PATH", os.path.join(home, "token"))))
    try:
        return str(path), path.read_text(encoding="utf-8") or None
    except (OSError, UnicodeDecodeError):
        return str(path), None


def _wandb_from_file() -> tuple[str, str | None]:
    """The netrc file, and the key that it has for W&B's server; None where there is none."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = Path(os.path.expanduser(os.environ.get("NETRC", "~/_netrc" if os.name == "nt" else "~/.netrc")))
    try:
        entry = netrc.netrc(str(path)).hosts.get(host or "")
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):  # the parser's message would quote the key
        entry = None
    return str(path), entry[2] if entry else None


def _wandb_takes_long_keys() -> bool:
    from importlib import metadata

    try:
        numbers = re.findall(r"\d+", metadata.version("wandb"))
    except metadata.PackageNotFoundError:
        return True  # nothing that would refuse it
    return tuple(map(int, numbers[:3])) >= (0, 22, 3)
