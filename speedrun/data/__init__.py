"""Data: tokens from an embedded corpus, a folder of text or .bin shards, as global batches."""

import os
from collections.abc import Sequence
from pathlib import Path

from speedrun.config import DataConfig
from speedrun.data import corpus, shards, text
from speedrun.data.batches import Data, DocumentRun, StageRows, Stream, batch_hash
from speedrun.data.documents import read_folder
from speedrun.data.encodings import check_encoding
from speedrun.data.prefetch import Prefetch, prefetch
from speedrun.data.vocabulary import Vocabulary
from speedrun.ranges import check_ranges
from speedrun.stages import Stage, tokens_before
from strategies.errors import UserError

__all__ = ["Data", "Prefetch", "batch_hash", "open_data", "prefetch"]

BYTES = Vocabulary(text.BYTE_DOCUMENT_START + 1, text.BYTE_DOCUMENT_START)
"""A token per byte, and the document start."""


def open_data(config: DataConfig, vocab_size: int, seed: int, stages: Sequence[Stage] = ()) -> Data:
    """Open `config.source`: `pydocs`, a folder of text files, or a folder of .bin shards.

    stages: of the run (`speedrun.stages.resolve`), where it has several; they replace config's batch and length.
    Reads the text, or the shards' headers; their tokens are read as batches ask for them.

    Raises:
        FileNotFoundError: the source is no folder.
        ValueError: a field out of its range, nothing to read, a file that cannot be decoded, a bad shard, a vocabulary
            or a batch that cannot be, too few validation tokens.
    """
    check_ranges(config, "data.")
    check_encoding(config.encoding)
    name, note, older_hash = config.source, "", ""
    if name == "pydocs":
        documents, content_hash = corpus.pydocs()
        whose = BYTES
        train_parts, val_parts = _text_parts(documents)
    else:
        folder = Path(os.path.expanduser(name))
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise FileNotFoundError(
                f"data.source {name!r} {what}: give a folder of text files, or of shards named *_train_*.bin and "
                "*_val_*.bin (`shardrun data fineweb` fetches some, `shardrun data tokenize` makes some), or "
                "'pydocs', which needs no download."
            )
        if any(folder.glob("*.bin")):
            train_paths, val_paths = shards.find_shards(folder)
            whose = shards.shards_vocabulary(folder, [*train_paths, *val_paths])
            content_hash = shards.shards_hash([*train_paths, *val_paths], whose)
            older_hash = shards.shards_hash_before([*train_paths, *val_paths], whose)
            train_parts, val_parts = (_shard_parts(paths, whose) for paths in (train_paths, val_paths))
            note = _unnamed(folder, len(train_paths) + len(val_paths))
        else:
            documents, report = read_folder(folder, config.encoding, config.text_field)
            whose = BYTES
            content_hash = text.content_hash(documents)
            train_parts, val_parts = _text_parts(documents)
            if not text.chosen_as_before(documents):  # the same documents, but another split of them than before
                content_hash = text.content_hash([content_hash.encode(), b"held out otherwise"])
            pieces, held_out = (len(parts[0].documents[0]) for parts in (train_parts, val_parts))
            held_out_bytes = len(val_parts[0].tokens) - held_out
            training_bytes = len(train_parts[0].tokens) - pieces
            cut = pieces + held_out > report.documents - report.copies
            words = text.held_out_in_words(training_bytes, held_out_bytes, cut=cut)
            note = "\n".join(filter(None, (report.in_short(), words)))

    if vocab_size < whose.size:
        raise UserError(
            f"data.source {name!r} has a vocabulary of {whose.size} tokens, with token {whose.document_start} before "
            f"each document, so model.vocab_size must be at least {whose.size}, not {vocab_size}."
        )
    length = config.eval_sequence_length or config.sequence_length
    rows = config.eval_tokens // length
    val_tokens = sum(len(part.tokens) for part in val_parts)
    if rows == 0:
        raise UserError(
            f"data.eval_tokens {config.eval_tokens} is less than one validation row of {length} tokens: raise it."
        )
    if rows * length + 1 > val_tokens:
        raise UserError(
            f"data.source {name!r} holds out {val_tokens} validation tokens, but data.eval_tokens {config.eval_tokens} "
            f"needs {rows * length + 1} (rows of {length} and one more): lower data.eval_tokens or add text."
        )
    first, *later = _streams(train_parts, config, vocab_size, seed, stages)
    return Data(
        name=name,
        content_hash=content_hash,
        document_start=whose.document_start,
        train_tokens=first.stream.epoch_length,
        val_tokens=val_tokens,
        global_batch=first.global_batch,
        validation_rows=rows,
        validation_length=length,
        byte_tokens=whose == BYTES,
        stream=first.stream,
        validation_parts=val_parts,
        later=later,
        tokenizer_sha256=whose.tokenizer_sha256,
        older_hash=older_hash,
        note=note,
    )


def _streams(
    parts: list[DocumentRun], config: DataConfig, vocab_size: int, seed: int, stages: Sequence[Stage]
) -> list[StageRows]:
    """Each stage's rows, from where the stage before stops; the last one's never end."""
    if not stages:
        return [StageRows(0, config.global_batch, Stream(parts, config.sequence_length, vocab_size, seed))]
    result = []
    for stage in stages:
        begin = tokens_before(stages, stage.first)
        end = None if stage is stages[-1] else tokens_before(stages, stage.last)
        stream = Stream(parts, stage.sequence_length, vocab_size, seed, begin, end)
        result.append(StageRows(stage.first, stage.global_batch, stream))
    return result


def _text_parts(documents: list[bytes]) -> tuple[list[DocumentRun], list[DocumentRun]]:
    training, validation = text.hold_out(documents)
    return (
        [DocumentRun("The training text", text.byte_tokens(training), text.BYTE_DOCUMENT_START)],
        [DocumentRun("The validation text", text.byte_tokens(validation), text.BYTE_DOCUMENT_START)],
    )


def _shard_parts(paths: list[Path], whose: Vocabulary) -> list[DocumentRun]:
    return [
        DocumentRun(f"Shard {path}", shards.open_shard(path), whose.document_start, shards.Watched(path))
        for path in paths
    ]


def _unnamed(folder: Path, used: int) -> str:
    """A line on .bin files that are neither for training nor for validation."""
    others = [path.name for path in sorted(folder.glob("*.bin")) if not shards.split_of(path)]
    if not others:
        return ""
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return f"shards: {used} read; {', '.join(others[:3])}{more} left out: the name says neither train nor val"
