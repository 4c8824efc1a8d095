"""Whether a checkpoint was written to its end, told by what the common formats write last. Nothing is loaded."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

TEMPORARY = re.compile(r"(^|[-_.])(tmp|temp|part|partial|incomplete|inprogress)([-_.]|$)", re.IGNORECASE)
ZIPPED = (".pt", ".pth", ".ckpt", ".bin")


def incomplete(path: Path) -> str:
    """The reason why the file or folder ``path`` is no whole checkpoint, or ""."""
    if TEMPORARY.search(path.name):
        return "its name says that it is still being written"
    if not path.exists():
        return "it is gone"
    if not path.is_dir():
        return _file(path)
    files = [file for file in path.rglob("*") if file.is_file()]
    if not files:
        return "the folder is empty"
    return _folder(path, {file.name for file in files}) or next(filter(None, map(_file, files)), "")


def _folder(path: Path, names: set[str]) -> str:
    if any(name.endswith(".distcp") for name in names) and ".metadata" not in names:
        return "it holds shards and no .metadata, which torch.distributed.checkpoint writes last"
    if "training_args.bin" in names and "trainer_state.json" not in names:
        return "it holds no trainer_state.json, which the Trainer writes last"
    tracker = path.parent / "latest_checkpointed_iteration.txt"
    number = re.fullmatch(r"iter_0*(\d+)", path.name)
    if number and tracker.is_file():
        said = tracker.read_text().strip()
        if said.isdecimal() and int(number[1]) > int(said):
            return f"{tracker.name} says that {said} is the last complete one"
    return ""


def _file(path: Path) -> str:
    if TEMPORARY.search(path.name):
        return f"{path.name} is still being written"
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        return "" if size == _safetensors(path) else f"{path.name} is cut off"
    if path.suffix in ZIPPED:
        if not size:
            return f"{path.name} is empty"
        with path.open("rb") as file:
            if file.read(2) == b"PK" and not zipfile.is_zipfile(path):
                return f"{path.name} is cut off"
    return ""


def _safetensors(path: Path) -> int:
    """The size that the file's own header gives, -1 if there is no header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= path.stat().st_size:
            return -1
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return -1
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0)
