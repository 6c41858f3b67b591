"""Batch systems: warnings of time limits, exit codes that say whether to try again, logs, the scripts."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from golden import digest
from lrsd_cli.main import main

from lrsd.checkpoint.verify import verify
from lrsd.errors import TRY_AGAIN
from lrsd.work.journal import partial_directory

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "scripts/slurm"
SMALL = ("--samples", "8", "--seqlen", "32")
LRSD = """#!/usr/bin/env bash
exec {python} -c 'from lrsd_cli.main import main; main()' "$@"
"""
# Takes down what it was asked, as SLURM's own would do it.
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >>"$(dirname "$0")/requeued"; fi
"""
# Starts the tasks, hands signals on, and ends with the highest code.
SRUN = """#!/usr/bin/env bash
shift # --kill-on-bad-exit=1
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_TASKS_PER_NODE="$SLURM_NTASKS(x1)" "$@" &
    tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}"' USR1
most=0
for task in "${tasks[@]}"; do
    while :; do
        code=0
        wait "$task" || code=$?
        kill -0 "$task" 2>/dev/null || break
    done
    ((code <= most)) || most=$code
done
exit "$most"
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Commands that the scripts call."""
    commands = {"lrsd": LRSD.format(python=sys.executable), "scontrol": SCONTROL, "srun": SRUN}
    for name, content in commands.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    return tmp_path


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(place: Path) -> Start:
    def run(script: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        path = f"{place}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", str(SLURM / script), *map(str, arguments)], cwd=place, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip

    return run


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, stderr = process.communicate(timeout=300)
    return process.returncode, stderr


def test_a_job_warned_of_its_limit_queues_itself_and_goes_on(
    place: Path, start: Start, tiny_model_dir: Path, text_file: Path
) -> None:
    out = place / "out"
    words = (tiny_model_dir, out, "--ratio", "4x", "--calib", text_file, "--samples", 64, "--seqlen", 128)
    job = {"SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "1", "LRSD_PAUSE": "0"}
    process = start("compress.sbatch", *words, **job)
    journal = partial_directory(out) / "journal.jsonl"
    while process.poll() is None and not (journal.exists() and "observe-0000" in journal.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    code, stderr = ended(process)
    assert code == TRY_AGAIN, stderr
    assert "the same command with --resume goes on" in stderr
    assert (place / "requeued").read_text() == "requeue 17\n"
    assert journal.exists()
    assert not out.exists()

    code, stderr = ended(start("compress.sbatch", *words, **job, SLURM_RESTART_COUNT="1"))
    assert code == 0, stderr
    assert (place / "requeued").read_text() == "requeue 17\n"
    verify(out)
    assert json.loads((place / "out.manifest.json").read_text())["ratio"] >= 4
    header = stderr.splitlines()[0]
    assert header.startswith(time.strftime("%Y-%m-"))
    assert "cpu (auto found no accelerator), 1 threads: lrsd compress" in header
    assert f"-o {out} --resume --json --ratio 4x" in header


def test_a_job_of_several_tasks_makes_the_bytes_of_one(
    place: Path, start: Start, tiny_model_dir: Path, text_file: Path
) -> None:
    """Warned of its limit like any other, and its tasks are two processes of one run."""
    words = ("--ratio", "4x", "--calib", text_file, "--samples", 64, "--seqlen", 128)
    job = {"SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "1", "LRSD_PAUSE": "0", "SLURM_JOB_NODELIST": "here"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    two = job | {"SLURM_NTASKS": "2", "MASTER_PORT": port}
    process = start("compress.sbatch", tiny_model_dir, place / "two", *words, **two)
    journal = partial_directory(place / "two") / "journal.jsonl"
    while process.poll() is None and not (journal.exists() and "observe-0000" in journal.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    code, stderr = ended(process)
    assert code == TRY_AGAIN, stderr
    assert (place / "requeued").read_text() == "requeue 17\n"

    code, stderr = ended(start("compress.sbatch", tiny_model_dir, place / "two", *words, **two))
    assert code == 0, stderr
    assert "1 threads, 2 processes: lrsd compress" in stderr
    assert json.loads((place / "two.manifest.json").read_text())["ratio"] >= 4
    code, stderr = ended(start("compress.sbatch", tiny_model_dir, place / "one", *words, **job))
    assert code == 0, stderr
    assert digest(place / "one") == digest(place / "two")


def test_what_can_never_succeed_is_not_queued_again(place: Path, start: Start, tiny_model_dir: Path) -> None:
    code, stderr = ended(start("compress.sbatch", tiny_model_dir, place / "out", "--ratio", "0.5x"))
    assert code == 2
    assert "ratio must be above 1x" in stderr
    code, stderr = ended(start("compress.sbatch", place / "nothing", place / "out", SLURM_JOB_ID="17"))
    assert code in (1, 2)
    code, stderr = ended(start("compress.sbatch", "one"))
    assert (code, "usage:" in stderr) == (2, True)
    assert not (place / "requeued").exists()


def test_a_sweep_has_every_combination_once(place: Path, start: Start) -> None:
    (place / "lrsd").write_text('#!/usr/bin/env bash\necho "$@" >>"$(dirname "$0")/asked"\n')
    grid = {"MODELS": "a/one b/one", "RATIOS": "3x 4x", "FORMATS": "lrsd gguf", "OUT": "made"}
    for task in range(8):
        assert ended(start("sweep.sbatch", "--seed", 1, **grid, SLURM_ARRAY_TASK_ID=str(task)))[0] == 0
    asked = (place / "asked").read_text().splitlines()
    names = {"lrsd": "", "gguf": ".gguf"}
    assert asked == [
        f"compress {model} -o made/{model.replace('/', '_')}-{ratio}-{form}{end} --resume --json "
        f"--ratio {ratio} --format {form} --calibration made/calibration --seed 1"
        for model in ("a/one", "b/one") for ratio in ("3x", "4x") for form, end in names.items()
    ]  # fmt: skip
    code, stderr = ended(start("sweep.sbatch", **grid, SLURM_ARRAY_TASK_ID="8"))
    assert (code, "there are 8 combinations, 0 to 7" in stderr) == (2, True)


@pytest.mark.parametrize("script", sorted(path.name for path in SLURM.iterdir()))
def test_the_scripts_are_sound(script: str) -> None:
    shellcheck = str(Path(sys.executable).with_name("shellcheck"))
    found = subprocess.run([shellcheck, str(SLURM / script)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_another_run_at_work_is_to_be_tried_again(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from lrsd.work.journal import Journal

    journal = Journal(partial_directory(tmp_path / "out"))
    journal.begin(None)
    arguments = [
        "compress",
        tiny_model_dir,
        "--ratio",
        "4x",
        "--calib",
        text_file,
        *SMALL,
        "-o",
        tmp_path / "out",
    ]
    monkeypatch.setattr(sys, "argv", ["lrsd", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    journal.close()
    assert stop.value.code == TRY_AGAIN
    assert "another lrsd is at work" in capsys.readouterr().err


def test_a_job_that_does_not_get_on_is_not_queued_for_ever(place: Path, start: Start) -> None:
    (place / "lrsd").write_text("#!/usr/bin/env bash\nexit 75\n")
    job = {"SLURM_JOB_ID": "17", "LRSD_RESTARTS": "2", "LRSD_PAUSE": "0"}
    for count in range(4):
        code, _ = ended(start("compress.sbatch", "model", "deep/out", **job, SLURM_RESTART_COUNT=str(count)))
        assert code == TRY_AGAIN
    assert (place / "requeued").read_text() == 2 * "requeue 17\n"


def test_a_job_that_is_canceled_stays_so(place: Path, start: Start) -> None:
    (place / "lrsd").write_text("#!/usr/bin/env bash\nexec sleep 60\n")
    process = start("compress.sbatch", "model", "out", SLURM_JOB_ID="17")
    while not (place / "out.manifest.json").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 128 + signal.SIGTERM
    assert not (place / "requeued").exists()
