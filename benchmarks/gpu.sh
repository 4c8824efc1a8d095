#!/usr/bin/env bash
# What watching costs on a CUDA machine, in eight minutes and without a network: the tests that need a GPU, then the ratios.
#
#     benchmarks/gpu.sh [--device cpu --tiny]
#
# Needs Python 3.11 to 3.13 with torch 2.11 or later and numpy. networkx comes with torch. What foreshock imports beyond these
# is named below if it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

missing=$("$PYTHON" - <<'PY'
import importlib.util
needed = {"torch": "", "numpy": "", "networkx": "", "typer": "the command line", "rich": "tables and the live view",
          "plotly": "reports", "jinja2": "reports", "scipy": "t-tests of the judge", "pytest": "the tests"}
print("\n".join(f"{name}: {use or 'everything'}" for name, use in needed.items() if importlib.util.find_spec(name) is None))
PY
)
[ -z "$missing" ] || printf 'not installed, and what it is needed for:\n%s\n' "$missing"

"$PYTHON" -c 'import torch, numpy, networkx' 2>/dev/null || exit 1

# Three folders are three packages: links stand in for an installation.
links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
mkdir "$links/foreshock"
for path in src/foreshock/*; do ln -s "$PWD/$path" "$links/foreshock/"; done
for room in patterns passes monitors; do ln -s "$PWD/$room" "$links/foreshock/$room"; done
export PYTHONPATH="$links:$PWD/benchmarks:$PWD/tests"

# A configuration of its own: that of the project needs pytest-timeout.
cat >"$links/pytest.ini" <<'INI'
[pytest]
markers =
    gpu: needs a CUDA device
    slow: minutes rather than seconds
filterwarnings =
    ignore::DeprecationWarning:torch.*
    ignore::FutureWarning:torch.*
INI
status=0
if "$PYTHON" -c 'import pytest, torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    timeout 130 "$PYTHON" -m pytest -q -p no:cacheprovider -c "$links/pytest.ini" --rootdir "$PWD" --import-mode=importlib \
        -m gpu tests/test_transfer.py || { status=1; echo "tests: FAILED, or not done in 130 s"; }
else
    echo "tests that need a GPU: left out (no pytest, or no CUDA device)"
fi
# It keeps to 320 s by itself; whoever stops it earlier has what was printed.
timeout 345 "$PYTHON" benchmarks/gpu.py "$@" || { status=1; echo "ratios: FAILED, or not done in 345 s"; }
exit $status
