"""Whether this machine can train under foreshock: versions, the backend's registration, a model that is really compiled."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foreshock.errors import ForeshockError

TORCH, PYTHON = ((2, 11), (2, 15)), ((3, 11), (3, 13))
OPTIONAL = {
    "transformers": ("transformers", "hf", "models of Hugging Face"),
    "pandas": ("pandas", "pandas", "Run.to_pandas"),
    "pyarrow": ("pyarrow", "parquet", "foreshock export to Parquet"),
    "tensorboard": ("tensorboard", "tensorboard", "TensorBoardSink"),
    "wandb": ("wandb", "wandb", "WandbSink"),
    "mlflow": ("mlflow", "mlflow", "MlflowSink"),
    "prometheus-client": ("prometheus_client", "prometheus", "PrometheusSink"),
    "triton": ("triton", "", "compiling for a GPU"),
}
PATIENCE = 300  # seconds
MOST_FILES = 100_000
COMPILE = """
import json, time, torch
import torch.nn.functional as F
from foreshock import Watch
from foreshock.config import Settings

class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(16, 16) for _ in range(3))
    def forward(self, x):
        q, k, v = (f(x).view(2, 8, 2, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

def train(backend):
    torch._dynamo.reset()
    model, began = Tiny().to(DEVICE), time.monotonic()
    torch.compile(model, backend=backend)(torch.randn(2, 8, 16, device=DEVICE)).square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    return round(time.monotonic() - began, 1)

plain = train("inductor")
print(json.dumps({"inductor": plain}), flush=True)
with Watch(settings=Settings(every=1, strict=True, merge=False)) as watch:
    seconds = train(watch.backend)
    print(json.dumps({"foreshock": seconds, "sites": len(watch.sites), "metrics": len(watch.metrics())}), flush=True)
"""
# What the compiler says when something is missing, and what to do about it.
GXX = "install a C++ compiler: apt-get install g++, dnf install gcc-c++ or xcode-select --install; CXX names another"
CURES = (
    ("Python.h", "install Python's headers: apt-get install python3-dev, or dnf install python3-devel"),
    ("No working C++ compiler", GXX),
    ("InvalidCxxCompiler", GXX),
    ("is not found.", GXX),
    ("omp.h", "install OpenMP: apt-get install libgomp1 (with g++), or brew install libomp"),
    ("Triton", "install the triton that belongs to this torch: pip install torch brings it on Linux"),
    ("No space left", "free the disk that holds the compile caches"),
)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. ``state``: "ok", "missing" (optional, or not there), "problem". ``advice``: what to do."""

    name: str
    state: str
    found: str
    advice: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def examine(*, compiles: bool = True, begin: Callable[[str], None] = lambda what: None) -> Iterator[Check]:
    """Look at everything, one check after the other; ``begin`` hears what comes next. ``compiles``: also compile a model."""
    begin("versions")
    yield from _versions()
    begin("registration")
    yield from _registered()
    begin("settings")
    yield _settings()
    begin("compile caches")
    yield _caches()
    begin("CUDA devices")
    devices = list(_devices())
    yield from devices
    yield from _optional()
    if compiles:
        for device in ("cpu", *(["cuda"] if any(check.state == "ok" for check in devices) else [])):
            begin(f"compiling a tiny model on {device}, which takes a minute at most")
            yield from _compiles(device)


def _versions() -> Iterator[Check]:
    import torch

    import foreshock

    yield Check("foreshock", "ok", f"{foreshock.__version__} in {Path(foreshock.__file__).parent}")
    yield _between("Python", platform.python_version(), PYTHON, f" at {sys.executable}")
    yield _between("torch", torch.__version__, TORCH, "")
    yield Check(
        "machine", "ok", f"{platform.platform()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads"
    )


def _between(name: str, version: str, range_: tuple[tuple[int, int], tuple[int, int]], more: str) -> Check:
    low, high = range_
    own = tuple(int(part) for part in version.split(".")[:2])
    said = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
    if low <= own <= high:
        return Check(name, "ok", version + more)
    return Check(name, "problem", version + more, f"foreshock is made for {name} {said}: install one of these")


def _registered() -> Iterator[Check]:
    import torch

    points = importlib.metadata.entry_points(group="torch_dynamo_backends")
    found = sorted({point.value for point in points if point.name == "foreshock"})
    ours = found == ["foreshock:instrumented"]
    advice = "" if ours else "install foreshock as a package (pip install .): a folder on the path registers nothing"
    yield Check("entry point", "ok" if ours else "problem", ", ".join(found) or "not registered", advice)
    backends = torch.compiler.list_backends()
    known = {"foreshock", "inductor"} <= set(backends)
    yield Check(
        "backends", "ok" if known else "problem", ", ".join(backends), "" if known else "as for the entry point"
    )


def _settings() -> Check:
    from foreshock.config import Settings, load_settings

    try:
        settings = load_settings()
    except ForeshockError as error:
        return Check("settings", "problem", str(error), "correct it")
    own = {name: value for name, value in asdict(settings).items() if value != getattr(Settings(), name)}
    return Check("settings", "ok", ", ".join(f"{name}={value!r}" for name, value in own.items()) or "all defaults")


def _caches() -> Check:
    from foreshock import _torch

    cache = _torch.compile_caches()
    folder = Path(cache.folder)
    there = next(path for path in (folder, *folder.parents) if path.exists())
    kinds = ", ".join(name for name, on in (("graphs", cache.graphs), ("autograd", cache.autograd)) if on) or "none"
    free = shutil.disk_usage(there).free
    found = f"{folder}: {_size(folder)}, {free / 2**30:.1f} GiB free; cached: {kinds}"
    if not os.access(there, os.W_OK):
        return Check("compile caches", "problem", found, f"{there} cannot be written: set TORCHINDUCTOR_CACHE_DIR")
    if free < 2**30:
        return Check(
            "compile caches", "problem", found, "less than 1 GiB free: empty the folder, or set TORCHINDUCTOR_CACHE_DIR"
        )
    return Check("compile caches", "ok", found)


def _size(folder: Path) -> str:
    if not folder.is_dir():
        return "not made yet"
    count = total = 0
    for here, _, names in os.walk(folder):
        for name in names:
            count += 1
            try:
                total += os.stat(os.path.join(here, name)).st_size
            except OSError:  # another process empties it
                continue
        if count > MOST_FILES:
            return f"more than {count} files"
    return f"{count} files of {total / 2**20:.0f} MiB"


def _devices() -> Iterator[Check]:
    import torch

    built = torch.version.cuda or torch.version.hip
    if not torch.cuda.is_available():
        found = f"none is available to torch {torch.__version__}" + (
            f", built for {built}" if built else ", built for CPU"
        )
        yield Check("CUDA", "missing", found, "see whether nvidia-smi lists a device" if built else "")
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        memory = device.total_memory / 2**30
        yield Check(f"cuda:{number}", "ok", f"{device.name}, {device.major}.{device.minor}, {memory:.0f} GiB")


def _optional() -> Iterator[Check]:
    by_module = importlib.metadata.packages_distributions()
    for name, (module, extra, what) in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            advice = f"pip install 'foreshock[{extra}]'" if extra else "only where there is a GPU"
            yield Check(name, "missing", f"not installed; for {what}", advice)
            continue
        known = by_module.get(module, [])  # mlflow may come as mlflow-skinny
        yield Check(name, "ok", importlib.metadata.version(known[0]) if known else "installed")


def _compiles(device: str) -> Iterator[Check]:
    """With fresh caches and in a process of its own: what was compiled before proves nothing, and a crash must not be ours."""
    with tempfile.TemporaryDirectory(prefix="foreshock-doctor-") as folder:
        own = {key: value for key, value in os.environ.items() if not key.startswith("FORESHOCK_")}
        try:
            done = subprocess.run(
                [sys.executable, "-c", COMPILE.replace("DEVICE", repr(device))],
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
                cwd=folder,
                env=own | {"TORCHINDUCTOR_CACHE_DIR": folder},
            )
        except subprocess.TimeoutExpired:
            yield Check(
                f"compiling on {device}", "problem", f"not done after {PATIENCE} s", "see what else the machine does"
            )
            return
    told: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            told |= json.loads(line)
    if "inductor" not in told:
        yield _failed(f"compiling on {device}", done.stderr)
        return
    yield Check(f"compiling on {device}", "ok", f"inductor compiled a model and trained a step in {told['inductor']} s")
    if told.get("sites") == 1 and done.returncode == 0:
        found = f"trained a step in {told['foreshock']} s: {told['sites']} site, {told['metrics']} metrics"
        yield Check(f"foreshock on {device}", "ok", found)
    else:
        yield _failed(f"foreshock on {device}", done.stderr)


def _failed(name: str, stderr: str) -> Check:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if "Error" in line or ": " in line), "it ended without a word")
    advice = next(
        (cure for sign, cure in CURES if sign in stderr),
        "the message is the compiler's own; TORCH_LOGS=inductor says more",
    )
    return Check(name, "problem", last[:400], advice)
