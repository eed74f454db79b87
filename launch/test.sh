#!/usr/bin/env bash
# From a fresh machine to a passed test suite, by two workers.
#   launch/test.sh              the quick suite: every promise of the support table at least once
#   launch/test.sh --all        the exhaustive matrix, ranks in fresh processes
#   launch/test.sh --part 2/6   the second of six parts of what only the exhaustive matrix has, likewise
# Further flags go to pytest (-n 0 -s: one process, and what the tests print; a path: only those tests).
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh train,test "${RSO_DS_VENV:-.venv}"
export PATH="$(cd "${RSO_DS_VENV:-.venv}" && pwd)/bin:$PATH"
# DeepSpeed's operations are compiled for this environment once, before any test waits for them.
PYTHONPATH=tests python -c "from support.environment import prepare; prepare(); import support.preloaded" > /dev/null
case " $* " in *" --all "*|*" --part "*) export RSO_DS_TEST_FRESH_RANKS=1 ;; esac
exec python -m pytest -n 2 "$@"
