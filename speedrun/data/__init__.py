"""Data: tokens from an embedded corpus, a folder of text or .bin shards, as global batches."""

from collections.abc import Sequence
from pathlib import Path

from speedrun.config import DataConfig
from speedrun.data import corpus, shards, text
from speedrun.data.batches import Data, DocumentRun, StageRows, Stream, batch_hash
from speedrun.data.prefetch import Prefetch, prefetch
from speedrun.stages import Stage, tokens_before

__all__ = ["Data", "Prefetch", "batch_hash", "open_data", "prefetch"]


def open_data(config: DataConfig, vocab_size: int, seed: int, stages: Sequence[Stage] = ()) -> Data:
    """Open `config.source`: `pydocs`, a folder of text files, or a folder of .bin shards.

    stages: of the run (`speedrun.stages.resolve`), where it has several; they replace config's batch and length.
    Reads the text, or the shards' headers; their tokens are read as batches ask for them.

    Raises:
        FileNotFoundError: the source is no folder.
        ValueError: nothing to read, a bad shard, a vocabulary or a batch that cannot be, too few validation tokens.
    """
    for field in ("sequence_length", "global_batch", "eval_tokens"):
        if getattr(config, field) < 1:
            raise ValueError(f"data.{field} is {getattr(config, field)}, but it must be at least 1.")
    if config.eval_sequence_length < 0:
        raise ValueError(
            f"data.eval_sequence_length is {config.eval_sequence_length}; give a length, or 0 for data.sequence_length."
        )
    if seed < 0:
        raise ValueError(f"seed is {seed}, but it must not be negative.")

    name = config.source
    if name == "pydocs":
        documents, content_hash = corpus.pydocs()
        train_parts, val_parts = _text_parts(documents)
    else:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise FileNotFoundError(
                f"data.source {name!r} {what}: give a folder of text files, or of GPT-2 shards named "
                "fineweb_train_*.bin and fineweb_val_*.bin (`shardrun data fineweb` fetches them), or "
                "'pydocs', which needs no download."
            )
        if any(folder.glob("*.bin")):
            train_paths, val_paths = shards.find_shards(folder)
            content_hash = shards.shards_hash([*train_paths, *val_paths])
            train_parts, val_parts = _shard_parts(train_paths), _shard_parts(val_paths)
        else:
            documents = text.read_folder(folder)
            content_hash = text.content_hash(documents)
            train_parts, val_parts = _text_parts(documents)

    document_start = train_parts[0].document_start
    if vocab_size <= document_start:
        raise ValueError(
            f"data.source {name!r} has token {document_start} before each document, so model.vocab_size must be at "
            f"least {document_start + 1}, not {vocab_size}."
        )
    length = config.eval_sequence_length or config.sequence_length
    rows = config.eval_tokens // length
    val_tokens = sum(len(part.tokens) for part in val_parts)
    if rows == 0:
        raise ValueError(
            f"data.eval_tokens {config.eval_tokens} is less than one validation row of {length} tokens: raise it."
        )
    if rows * length + 1 > val_tokens:
        raise ValueError(
            f"data.source {name!r} holds out {val_tokens} validation tokens, but data.eval_tokens {config.eval_tokens} "
            f"needs {rows * length + 1} (rows of {length} and one more): lower data.eval_tokens or add text."
        )
    first, *later = _streams(train_parts, config, vocab_size, seed, stages)
    return Data(
        name=name,
        content_hash=content_hash,
        document_start=document_start,
        train_tokens=first.stream.epoch_length,
        val_tokens=val_tokens,
        global_batch=first.global_batch,
        validation_rows=rows,
        validation_length=length,
        byte_tokens=document_start == text.BYTE_DOCUMENT_START,
        stream=first.stream,
        validation_parts=val_parts,
        later=later,
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


def _shard_parts(paths: list[Path]) -> list[DocumentRun]:
    return [DocumentRun(f"Shard {path}", shards.open_shard(path), shards.GPT2_DOCUMENT_START) for path in paths]
