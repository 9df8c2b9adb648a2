"""FineWeb from the Hugging Face hub: GPT-2 tokens in .bin shards, no byte fetched twice, no file trusted unchecked.

What is asked of the hub (its address from HF_ENDPOINT; the token of HF_TOKEN or of `hf auth login` goes along):

    GET /api/datasets/REPOSITORY/revision/main?blobs=true    the commit, and every file's length and SHA-256
    GET /datasets/REPOSITORY/resolve/COMMIT/FILE             from byte N on, where N bytes of it are here already

The listing comes first. So all files are of one commit, and what each must be is known before it comes. A file grows as
`FILE.HASH.part` and gets its name when length, hash and header are right; the part survives whatever ends the download,
and the next run goes on behind its last byte. (huggingface_hub's own `hf_hub_download` begins every run at zero, since
version 1: its temporary files have random names. Its client, addresses, token and retries within a run are used here.)
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from speedrun.data.shards import open_shard
from strategies.errors import UserError

REPOSITORY = "kjj0/fineweb10B-gpt2"
"""The data set on the hub: 103 training shards of 100M tokens and a validation shard."""

TOKENIZER_REPOSITORY = "openai-community/gpt2"

AGAIN = "run the same command again, it goes on where it stopped"


class DownloadError(OSError):
    """The hub, the network or the disk failed; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class HubFile:
    """A file of the data set as the hub lists it."""

    name: str
    size: int  # bytes
    sha256: str  # hexadecimal digits


@dataclass(frozen=True)
class Download:
    """What `fetch` has put into its folder."""

    commit: str
    """The data set's commit, 40 hexadecimal digits."""
    files: list[HubFile]
    """The files asked for, all of them there and checked; validation first."""
    fetched_bytes: int
    """Bytes that came over the network this time."""


def fetch(folder: Path, shards: int, say: Callable[[str], None] = print, endpoint: str | None = None) -> Download:
    """Fetch the validation shard and the first `shards` training shards into `folder`; tell each file to `say`.

    A full shard is 200,001,024 bytes. What is there already is checked and left alone. `endpoint`: instead of
    HF_ENDPOINT's address.

    Raises:
        DownloadError: no network, access refused, nothing there, a full disk, or a file that is not what the hub lists.
        ValueError: huggingface_hub is not installed, or the data set has fewer shards.
    """
    require("huggingface_hub", "the download from the Hugging Face hub")
    if shards < 1:
        raise UserError(f"{shards} training shards were asked for, but training needs at least 1.")
    commit, listed = _listing(endpoint)
    validation = [file for file in listed if file.name.startswith("fineweb_val_")]
    training = [file for file in listed if file.name.startswith("fineweb_train_")]
    if not validation or len(training) < shards:
        raise UserError(
            f"{REPOSITORY} holds {len(training)} training shards and {len(validation)} for validation, but {shards} "
            "and at least 1 were asked for: ask for fewer."
        )
    wanted = [*validation, *training[:shards]]
    with _one_sentence(f"The folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        missing = sum(file.size - _size(_part(folder, file)) for file in wanted if not (folder / file.name).exists())
        free = shutil.disk_usage(folder).free
    if missing > free:
        raise DownloadError(
            f"{folder} has {free / 1e9:.1f} GB free and the download needs {missing / 1e9:.1f} GB more: make room, ask "
            "for fewer shards or name another folder with --out."
        )
    fetched = 0
    for number, file in enumerate(wanted, start=1):
        there = (folder / file.name).exists()
        fetched += 0 if there else file.size - _size(_part(folder, file))
        if there:
            _check(folder / file.name, file, "delete it to have it fetched again")
        else:
            _fetch(folder, file, commit, endpoint)
        done = "was there" if there else "fetched"
        say(f"[{number}/{len(wanted)}] {file.name}: {done}, {file.size:,} bytes, SHA-256 {file.sha256[:12]}… matches")
    return Download(commit, wanted, fetched)


def gpt2_tokenizer(endpoint: str | None = None) -> Path:
    """GPT-2's `tokenizer.json`, fetched into huggingface_hub's cache where it is not there yet.

    Raises:
        DownloadError: as `fetch`.
        ValueError: huggingface_hub is not installed.
    """
    require("huggingface_hub", "the download of GPT-2's tokenizer")
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    cached = cached_gpt2_tokenizer()
    if cached:
        return cached
    with _one_sentence(f"GPT-2's tokenizer ({TOKENIZER_REPOSITORY})"):
        # Asked first because it fails at once, where the download alone would ask again and again for half a minute.
        get_hf_file_metadata(hf_hub_url(TOKENIZER_REPOSITORY, "tokenizer.json", endpoint=endpoint))
        return Path(hf_hub_download(TOKENIZER_REPOSITORY, "tokenizer.json", endpoint=endpoint))


def cached_gpt2_tokenizer() -> Path | None:
    """Where an earlier download has left GPT-2's tokenizer; None where there was none, or no huggingface_hub."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    cached = try_to_load_from_cache(TOKENIZER_REPOSITORY, "tokenizer.json")
    return Path(cached) if isinstance(cached, str) else None


def require(module: str, what: str) -> None:
    """Raise ValueError where a library of the extra `data` is missing."""
    try:
        __import__(module)
    except ImportError as error:
        raise UserError(f"{module} is not installed, and {what} needs it: pip install 'shardrun[data]'.") from error


def _listing(endpoint: str | None) -> tuple[str, list[HubFile]]:
    """The data set's commit and its .bin files, sorted by name."""
    from huggingface_hub import HfApi

    with _one_sentence(f"The data set {REPOSITORY}"):
        try:
            info = HfApi(endpoint=endpoint).dataset_info(REPOSITORY, revision="main", files_metadata=True)
        except json.JSONDecodeError as error:
            raise OSError("the answer is not the hub's: the login page of a network, or a proxy's?") from error
    files = []
    for entry in info.siblings or []:
        if entry.rfilename.endswith(".bin"):
            if entry.lfs is None:
                raise DownloadError(f"The hub lists {entry.rfilename} without a SHA-256, so it cannot be checked.")
            files.append(HubFile(entry.rfilename, entry.lfs.size, entry.lfs.sha256))
    return str(info.sha), sorted(files, key=lambda file: file.name)


def _fetch(folder: Path, file: HubFile, commit: str, endpoint: str | None) -> None:
    """Complete a file's part, check it and give it its name."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    part = _part(folder, file)
    url = hf_hub_url(REPOSITORY, file.name, repo_type="dataset", revision=commit, endpoint=endpoint)
    if _size(part) > file.size:
        part.unlink()
    have = _size(part)
    if have < file.size:
        with _one_sentence(f"{file.name} of {REPOSITORY}", part), open(part, "ab") as out:
            http_get(
                url,
                out,
                resume_size=have,
                headers=build_hf_headers(),
                expected_size=file.size,
                displayed_filename=file.name,
            )
    try:
        _check(part, file, "what came is deleted; run the same command again")
    except DownloadError:
        part.unlink()
        raise
    part.replace(folder / file.name)


def _check(path: Path, file: HubFile, way_out: str) -> None:
    """Raise DownloadError if the file at `path` has not the length and the hash that the hub lists, or is no shard."""
    fault = None
    size = path.stat().st_size
    if size != file.size:
        fault = f"it has {size:,} bytes and not {file.size:,}"
    else:
        with open(path, "rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != file.sha256:
            fault = f"its SHA-256 is {found} and not {file.sha256}"
    if fault:
        raise DownloadError(f"{path} is not the {file.name} that the hub lists: {fault}; {way_out}.")
    try:
        open_shard(path)
    except ValueError as error:
        raise DownloadError(f"The hub's {file.name} is no shard of tokens: {error}") from error


def _part(folder: Path, file: HubFile) -> Path:
    """Where the file grows. The hash in the name: what is left of another version is not gone on with."""
    return folder / f"{file.name}.{file.sha256[:8]}.part"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@contextmanager
def _one_sentence(what: str, part: Path | None = None) -> Iterator[None]:
    """Turn what huggingface_hub, its HTTP client and the disk raise into a DownloadError about `what`."""
    from huggingface_hub.utils import HfHubHTTPError

    # The client is requests, httpx or httpx2, by huggingface_hub's version; its errors are OSErrors or have the base
    # that it shares with HfHubHTTPError.
    failures: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
    try:
        yield
    except failures as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        number = error.errno if isinstance(error, OSError) else None
        if status == 416 and part:  # nothing behind what is here, though the listing says so
            part.unlink()
        if status is not None:
            raise DownloadError(_refused(what, int(status))) from error
        if number in (errno.ENOSPC, errno.EDQUOT):
            kept = f" ({_size(part):,} bytes of it are kept)" if part else ""
            raise DownloadError(f"{what} does not fit, the disk is full{kept}: make room and {AGAIN}.") from error
        if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise DownloadError(f"{what} cannot be written: {error}; name another folder with --out.") from error
        first_line = (str(error).splitlines() or [""])[0]
        got = f" after {_size(part):,} bytes" if part and _size(part) else ""
        raise DownloadError(
            f"{what} could not be fetched{got}, the network or the hub failed ({type(error).__name__}: {first_line}): "
            f"connect, and {AGAIN}."
        ) from error


def _refused(what: str, status: int) -> str:
    """One sentence for an HTTP status that is not success."""
    if status in (401, 403):
        return (
            f"{what} is refused by the hub (status {status}): the token of HF_TOKEN or `hf auth login` is wrong, has "
            "expired or gives no access to it; renew it, or take it away, for public data needs none."
        )
    if status == 404:
        return f"{what} is not there (status 404): it was moved or deleted, or HF_ENDPOINT names a server without it."
    return f"{what} could not be fetched, the hub answered with status {status}: wait a little and {AGAIN}."
