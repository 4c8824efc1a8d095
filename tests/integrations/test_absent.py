"""What is said where a library is not installed: what was being done, and the command that installs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SINK = "from foreshock.monitors.sinks import named; named({!r})"
# Libraries that are blocked, what is done without them, what is said to have been under way, and what is to be installed.
CASES = {
    "transformers": (
        ["transformers"],
        "import foreshock.integrations.huggingface",
        "importing the Trainer",
        "'foreshock[hf]'",
    ),
    "accelerate": (
        ["accelerate"],
        "import foreshock.integrations.accelerate",
        "importing the Accelerator",
        "'foreshock[accelerate]'",
    ),
    "lightning": (
        ["lightning", "pytorch_lightning"],
        "import foreshock.integrations.lightning",
        "importing Lightning",
        "'foreshock[lightning]'",
    ),
    "fabric": (
        ["lightning", "lightning_fabric"],
        "import foreshock.integrations.fabric",
        "importing Fabric",
        "'foreshock[lightning]'",
    ),
    "torchtitan": (
        ["torchtitan"],
        "import foreshock.integrations.torchtitan",
        "importing torchtitan",
        "torchtitan==0.3.0, the tested version",
    ),
    "wandb": (["wandb"], SINK.format("wandb"), "making a WandbSink", "'foreshock[wandb]'"),
    "mlflow": (["mlflow"], SINK.format("mlflow"), "making a MlflowSink", "'foreshock[mlflow]'"),
    "tensorboard": (
        ["tensorboard"],
        SINK.format("tensorboard"),
        "making a TensorBoardSink",
        "'foreshock[tensorboard]'",
    ),
    "prometheus": (
        ["prometheus_client"],
        SINK.format("prometheus"),
        "making a PrometheusSink",
        "'foreshock[prometheus]'",
    ),
    "pandas": (
        ["pandas"],
        "foreshock.open_run('run').to_pandas()",
        "turning run/run.sqlite into a frame",
        "'foreshock[pandas]'",
    ),
    "pyarrow": (
        ["pyarrow"],
        "from foreshock.export import export; export(foreshock.open_run('run'), 'run.parquet')",
        "exporting to Parquet",
        "'foreshock[parquet]'",
    ),
}
# One process for all, for torch takes long to import; what is blocked was never imported before.
SCRIPT = """
import json
import sys

import foreshock

with foreshock.Watch("run", every=1) as watch:
    watch.log(loss=1.0)
blocked = ()


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocked())
told = {}
for name, (blocked, code) in json.loads(sys.argv[1]).items():
    assert not set(blocked) & {module.split(".")[0] for module in sys.modules}, name
    try:
        exec(code)
    except foreshock.ForeshockError as error:
        told[name] = str(error)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    asked = json.dumps({name: case[:2] for name, case in CASES.items()})
    where = tmp_path_factory.mktemp("absent")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, asked], cwd=where, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_library_that_is_absent(name: str, told: dict[str, str]) -> None:
    blocked, _, doing, install = CASES[name]
    assert told[name].startswith(doing)
    assert any(library in told[name] for library in blocked)
    assert f"pip install {install}" in told[name]


ALONE = """
import sys

sys.modules["lightning"] = None
from foreshock.integrations import fabric, lightning

print(lightning.Callback.__module__.split(".")[0], fabric.Fabric.__module__.split(".")[0])
"""


@pytest.mark.slow
def test_lightnings_parts_are_taken_where_they_stand_alone(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["pytorch_lightning", "lightning_fabric"], done.stderr
