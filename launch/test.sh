#!/usr/bin/env bash
# From a fresh machine to a passed test suite, by two workers. Further flags go to pytest (-n 0 -s: one process, and
# what the tests print).
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh train,test "${RSO_DS_VENV:-.venv}"
export PATH="$(cd "${RSO_DS_VENV:-.venv}" && pwd)/bin:$PATH"
exec python -m pytest -n 2 "$@"
