#!/usr/bin/env bash
# Make a virtual environment with rso_ds and the given extras: install.sh EXTRAS [FOLDER]
# EXTRAS is a list such as train,test. An existing FOLDER is brought up to date.
set -euo pipefail
extras=$1
venv=${2:-.venv}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" - <<'PY' || { echo "rso_ds needs Python 3.10 or newer; set PYTHON=/path/to/python3" >&2; exit 1; }
import sys
sys.exit(sys.version_info < (3, 10))
PY
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# torch is pinned for a reproducible environment; setup.py itself allows a range.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".[$extras]"
