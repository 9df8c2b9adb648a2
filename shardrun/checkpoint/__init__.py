"""`shardrun checkpoint inspect | verify | export PATH`: look into a checkpoint, check it, hand its weights on.

PATH is a checkpoint's folder, or a run's: then the newest of its history.
"""

import argparse
from pathlib import Path
from typing import Any

from shardrun.help import add_parser
from speedrun.run.writer import status
from strategies import strict_json
from strategies.checkpoint import folder as folders
from strategies.checkpoint.format import INDEX, SUMS, Index, read_index, unseen

ACTIONS = {
    "inspect": "what is in it, and whether all of it is finite",
    "verify": "every byte against its hash, and whether every value is finite",
    "export": "the weights as safetensors, with config.json and a model card, as models lie on the Hugging Face hub",
}

USELESS = "no run can go on from it; use an earlier checkpoint."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, about in ACTIONS.items():
        action = add_parser(actions, name, about)
        action.add_argument("path", type=Path, help="a checkpoint's folder, or a run's: its history's newest")
        action.add_argument("--json", action="store_true", help="print JSON")
        if name == "export":
            action.add_argument("--out", type=Path, required=True, help="the folder to write, which must not be there")


def run(arguments: argparse.Namespace) -> int:
    folder = folders.find_checkpoint(arguments.path)
    ended = 0
    if arguments.action == "inspect":
        content = describe(folder, read_index(folder))
    elif arguments.action == "verify":
        content = check(folder)
        ended = 0 if content["intact"] and not content["not_finite"] else 1
    else:
        from shardrun.checkpoint.export import export  # torch only here
        from shardrun.checkpoint.tokens import tokens_of

        index = read_index(folder)
        written = export(folder, index, arguments.out)
        content = {"path": str(folder), "out": str(arguments.out), "files": {p.name: p.stat().st_size for p in written}}
        content["tokens"] = tokens_of(index).words
    if arguments.json:
        print(strict_json.dumps({"schema": 1, **content}, indent=2))
    else:
        show = {"inspect": show_description, "verify": show_check, "export": show_export}[arguments.action]
        show(content)
    return ended


def describe(folder: Path, index: Index) -> dict[str, Any]:
    """What a checkpoint holds, from its index; bytes and elements by kind of tensor. Tensors are read only where the
    index does not know whether they are finite."""
    wrong = None
    if unseen(folder, index):
        from strategies.checkpoint.finite import not_finite  # torch only here

        wrong = not_finite(folder, index)
    kinds: dict[str, dict[str, int]] = {}
    for name, tensor in index.tensors.items():
        kind = kinds.setdefault(name.partition("/")[0], {"tensors": 0, "elements": 0})
        kind["tensors"] += 1
        kind["elements"] += tensor.numel
    return {
        "path": str(folder),
        "step": index.step,
        "saved_by": index.saved_by,
        "bytes": sum(index.files.values()),
        "not_finite": wrong,
        "files": index.files,
        "kinds": kinds,
        "run": index.run,
        "checkpoints": {str(step): path.name for step, path in folders.of_history(folder.parent).items()},
        **around(folder),
    }


def around(checkpoint: Path) -> dict[str, Any]:
    """The run that a checkpoint lies in: its status (speedrun.run.writer.status; None where there is no run), and what
    it has set aside."""
    run = next((path.parent for path in checkpoint.resolve().parents if path.name == "checkpoints"), None)
    aside = folders.set_aside(run / "checkpoints") if run else []
    return {"status": status(run) if run else None, "set_aside": [str(path) for _, _, path in aside]}


def check(folder: Path) -> dict[str, Any]:
    """Read and hash every file, and look for every tensor's place in them; `error` says what is damaged first, and
    `not_finite` which tensor of an intact one holds a NaN or an infinity."""
    from strategies.checkpoint.finite import not_finite
    from strategies.checkpoint.load import verify_files
    from strategies.checkpoint.shards import Shards

    content: dict[str, Any] = {"path": str(folder), "intact": False, "error": None, "not_finite": None}
    content |= around(folder)
    try:
        index = read_index(folder)
        verify_files(folder, index)
        with Shards(folder) as shards:
            shards.check(index.tensors)
        content["not_finite"] = not_finite(folder, index)
    except (ValueError, FileNotFoundError) as error:
        return {**content, "error": str(error)}
    known = {*index.files, INDEX, SUMS}
    strangers = sorted(path.name for path in folder.iterdir() if path.name not in known)
    size = sum(index.files.values())
    content |= {"intact": True, "step": index.step, "files": len(index.files), "bytes": size}
    return {**content, "strangers": strangers}


def show_description(content: dict[str, Any]) -> None:
    by = content["saved_by"]
    ranks = f"{by['world_size']} rank{'s' if by['world_size'] != 1 else ''}"
    print(f"{content['path']}\n  step {content['step']}, saved by {by['strategy']} on {ranks} in {by['precision']}")
    run = content["run"]
    if "preset" in run:
        print(f"  preset {run['preset']}, {run['parameters']:,} parameters")
    figures = run.get("metrics", {})
    shown = {name: figures[name] for name in ("train_loss", "val_loss", "tokens") if figures.get(name) is not None}
    if shown:
        print(
            "  "
            + ", ".join(
                f"{name} {value:,}" if name == "tokens" else f"{name} {value:.4f}" for name, value in shown.items()
            )
        )
    print(f"  {content['bytes']:,} bytes in {len(content['files'])} files")
    if content["not_finite"]:
        print(f"  {content['not_finite']}: {USELESS}")
    width = max((len(kind) for kind in content["kinds"]), default=0)
    for kind, line in content["kinds"].items():
        print(f"    {kind:<{width}}  {line['tensors']:>5} tensors  {line['elements']:>14,} elements")
    print(f"  checkpoints of this history: {', '.join(content['checkpoints'].values())}")
    show_around(content)


def show_around(content: dict[str, Any]) -> None:
    if content["status"]:
        print(f"  status of the run: {content['status']}")
    for path in content["set_aside"]:
        print(f"  set aside, of a history that was left: {path}")


def show_check(content: dict[str, Any]) -> None:
    if content["error"]:
        print(f"damaged: {content['error']}")
        show_around(content)
        return
    print(f"{content['path']}: intact, {content['files']} files, {content['bytes']:,} bytes, every hash as written")
    if content["not_finite"]:
        print(f"  but {content['not_finite']}: {USELESS}")
    for name in content["strangers"]:
        print(f"  {name} is no part of it: never read")
    show_around(content)


def show_export(content: dict[str, Any]) -> None:
    print(f"{content['path']} → {content['out']}")
    for name, size in content["files"].items():
        print(f"  {name}  {size:,} bytes")
    print(content["tokens"])
