"""Single tensors out of a saved checkpoint: safetensors, `torch.save` or `torch.distributed.checkpoint`, one file or many.

Only what is asked for is read, and nothing that a file holds is run: no pickle is loaded beyond tensors and plain values.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foreshock.errors import CheckpointError

Shape = tuple[int, ...]
# What safetensors calls the dtypes that are weights as they stand; 8-bit ones mean nothing without their scales.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
INDEX = ".index.json"
METADATA = ".metadata"


class Saved:
    """An open checkpoint. ``shapes`` says what is there; ``read_bytes`` and ``read_keys`` count what was read of it."""

    def __init__(self, path: Path, shapes: Mapping[str, Shape]) -> None:
        self.path, self.shapes = path, shapes
        self.read_bytes = 0
        self.read_keys: set[str] = set()

    def tensors(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The tensors of these keys, on the host. Raises CheckpointError for what cannot be read or is no weight."""
        found = self._tensors(keys)
        for key, tensor in found.items():
            _refuse_quantized(self.path, key, tensor.dtype in DTYPES.values(), str(tensor.dtype).removeprefix("torch."))
            self.read_keys.add(key)
            self.read_bytes += tensor.numel() * tensor.element_size()
        return found

    def _tensors(self, keys: Sequence[str]) -> dict[str, Tensor]:
        raise NotImplementedError


class _Safetensors(Saved):
    """safetensors files. `safe_open` maps them: shapes come from their headers, and of the data what is asked for is loaded."""

    def __init__(self, path: Path, files: Mapping[str, Path] | Sequence[Path]) -> None:
        """``files``: by key, as an index has it, and then opened when they are needed; or all of them."""
        self._open: dict[Path, Any] = {}
        self._files: dict[str, Path] = dict(files) if isinstance(files, Mapping) else {}
        for file in () if isinstance(files, Mapping) else files:
            self._files |= dict.fromkeys(self._opened(file).keys(), file)
        super().__init__(path, _Shapes(self))

    def keys(self) -> Iterator[str]:
        return iter(self._files)

    def shape(self, key: str) -> Shape:
        return tuple(self._slice(key).get_shape())

    def _tensors(self, keys: Sequence[str]) -> dict[str, Tensor]:
        for key in keys:
            dtype = self._slice(key).get_dtype()
            _refuse_quantized(self._files[key], key, dtype in DTYPES, dtype)
        return {key: self._opened(self._files[key]).get_tensor(key).clone() for key in keys}

    def _slice(self, key: str) -> Any:
        file = self._opened(self._files[key])
        try:
            return file.get_slice(key)
        except Exception as error:
            raise _damaged(self._files[key], f"the index says that {key} is there, and it is not") from error

    def _opened(self, file: Path) -> Any:
        if file not in self._open:
            try:
                from safetensors import safe_open
            except ImportError as error:
                told = f"opening the checkpoint {file}: safetensors is not installed"
                raise CheckpointError(f"{told}; pip install 'foreshock[safetensors]'") from error
            try:
                self._open[file] = safe_open(file, "pt")
            except Exception as error:
                raise _damaged(file, error) from error
        return self._open[file]


class _Shapes(Mapping[str, Shape]):
    """Shapes by key, of which a file is opened only when one of its keys is asked for."""

    def __init__(self, saved: _Safetensors) -> None:
        self._saved = saved

    def __getitem__(self, key: str) -> Shape:
        return self._saved.shape(key)

    def __contains__(self, key: object) -> bool:
        return key in self._saved._files

    def __iter__(self) -> Iterator[str]:
        return self._saved.keys()

    def __len__(self) -> int:
        return len(self._saved._files)


class _Pickled(Saved):
    """Files of `torch.save`, mapped into memory, so that only the pages of what is read are loaded."""

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self._held: dict[str, Tensor] = {}
        for file in files:
            self._held |= dict(_flat(_load(file)))
        super().__init__(path, {key: tuple(tensor.shape) for key, tensor in self._held.items()})

    def _tensors(self, keys: Sequence[str]) -> dict[str, Tensor]:
        return {key: self._held[key].detach().clone() for key in keys}


class _Distributed(Saved):
    """A folder of `torch.distributed.checkpoint`."""

    def __init__(self, path: Path) -> None:
        try:
            with (path / METADATA).open("rb") as file:
                found = _PlainValues(file).load()
            ends: dict[str, int] = {}
            for stored in (found.storage_data or {}).values():
                ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
            entries = {key: entry for key, entry in found.state_dict_metadata.items() if hasattr(entry, "size")}
        except Exception as error:
            raise _damaged(path / METADATA, error) from error
        for name, end in ends.items():
            if (path / name).is_file() and (path / name).stat().st_size < end:
                raise _damaged(path / name, "it is cut off")
        self._entries = entries
        super().__init__(path, {key: tuple(entry.size) for key, entry in self._entries.items()})

    def _tensors(self, keys: Sequence[str]) -> dict[str, Tensor]:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        wanted = {key: torch.empty(self.shapes[key], dtype=self._entries[key].properties.dtype) for key in keys}
        reader = FileSystemReader(self.path)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
                load(wanted, storage_reader=reader, no_dist=True)
        except (Exception, CheckpointException) as error:
            failures = getattr(error, "failures", None)  # by rank, with their tracebacks
            cause = next(iter(failures.values()))[0] if failures else error
            raise _damaged(self.path, cause) from error
        return wanted


class _PlainValues(pickle.Unpickler):
    """Makes the records of `torch.distributed.checkpoint` and nothing else: its metadata is a pickle, which could run anything."""

    def find_class(self, module: str, name: str) -> Any:
        """Nothing is imported before it is known to be harmless."""
        value = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout)
        record = module == _RECORDS and name.isidentifier()
        if record or value or (module, name) in _HARMLESS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of a checkpoint")


_RECORDS = "torch.distributed.checkpoint.metadata"
_HARMLESS = {
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
    ("torch.serialization", "_get_layout"),
    ("builtins", "set"),
    ("builtins", "frozenset"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
}


def open_saved(path: str | Path) -> Saved:
    """The checkpoint at ``path``: a file, or a folder that holds one. Raises CheckpointError, naming what is wrong with it."""
    found = Path(path)
    if not found.exists():
        raise CheckpointError(f"opening the checkpoint {found}: there is no such file or folder")
    if found.is_file():
        return _opened(found, [found])
    if (found / METADATA).is_file():
        return _Distributed(found)
    files = sorted(file for file in found.iterdir() if file.is_file())
    for suffix in (".safetensors", *PICKLED):
        index = next((file for file in files if file.name.endswith(suffix + INDEX)), None)
        parts = [file for file in files if file.suffix == suffix]
        if index is not None:
            return _opened(found, _indexed(index))
        whole = [file for file in parts if file.stem in ("model", "pytorch_model", "consolidated")]
        if suffix == ".safetensors" and parts:
            return _opened(found, whole or parts)
        if len(whole or parts) == 1:
            return _opened(found, whole or parts)
        if parts:
            named = ", ".join(file.name for file in parts[:8])
            raise CheckpointError(f"opening the checkpoint {found}: it holds several files ({named}); name one of them")
    kinds = f"{METADATA} (torch.distributed.checkpoint), .safetensors, {', '.join(PICKLED)}"
    raise CheckpointError(f"opening the checkpoint {found}: the folder holds none of {kinds}")


def _opened(path: Path, files: Mapping[str, Path] | Sequence[Path]) -> Saved:
    some = list(files.values() if isinstance(files, Mapping) else files)
    if some and all(file.suffix == ".safetensors" for file in some):
        return _Safetensors(path, files)
    return _Pickled(path, list(dict.fromkeys(some)))


def _indexed(index: Path) -> dict[str, Path]:
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(key): index.parent / str(file) for key, file in named.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(index, f"{type(error).__name__}: {error}") from error


def _load(file: Path) -> Any:
    for mapped in (True, False):  # files of before torch 1.6 cannot be mapped, and are loaded whole
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            what = str(error).partition("\n")[0]
            told = f"it holds more than tensors and plain values ({what}); save the model's state_dict() alone"
            raise CheckpointError(f"opening the checkpoint {file}: {told}") from error
        except Exception as error:
            if not mapped:
                raise _damaged(file, error) from error
    raise AssertionError


def _flat(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield ".".join(path), value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, (*path, str(key)))


def _refuse_quantized(path: Path, key: str, whole: bool, dtype: str) -> None:
    if not whole:
        told = f"{key} is stored as {dtype}, quantized"
        raise CheckpointError(f"reading {path}: {told}; save the weights in 16 or 32 bits")


def _damaged(path: Path, error: object) -> CheckpointError:
    what = str(error).strip().partition("\n")[0] or type(error).__name__
    return CheckpointError(f"reading {path}: no whole checkpoint ({what}); save it again, or scan an earlier one")
