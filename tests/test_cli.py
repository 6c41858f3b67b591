"""The command line: what it prints where, and what it leaves behind when it is stopped."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import pytest
import torch
from click.testing import CliRunner, Result
from forks import Ended, run_in_fork
from lrsd_cli.main import commands, main
from lrsd_cli.options import given_options
from safetensors.torch import load_file

from lrsd.errors import CheckpointError
from lrsd.methods import METHODS
from lrsd.methods.lrsd import Lrsd
from lrsd.recipe import GROUPS, Recipe

# Every class of settings.
KINDS = (*GROUPS.values(), *METHODS.values())
COMMANDS = sorted(commands.list_commands(click.Context(commands)))
SMALL = ("--samples", "8", "--seqlen", "32")
Run = Callable[..., Result]


@pytest.fixture(scope="session")
def run() -> Run:
    """One command in this process; it must succeed."""

    def invoke(*arguments: object) -> Result:
        result = CliRunner().invoke(commands, [str(word) for word in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result

    return invoke


def start(*arguments: object) -> subprocess.Popen[str]:
    """One command as users run it, in a process of its own."""
    # A test run in the background may have been started with SIGINT ignored, which children inherit.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from lrsd_cli.main import main; main()"
    )
    command = [sys.executable, "-c", program, *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, **pipes)


def lrsd(*arguments: object) -> Ended:
    """One command to its end, with files of its own for stdout and stderr."""

    def work() -> None:
        sys.argv = ["lrsd", *map(str, arguments)]
        main()

    return run_in_fork(work)


@pytest.fixture(scope="session")
def compressed(
    run: Run, tiny_model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("cli") / "compressed"
    run("compress", tiny_model_dir, "--ratio", "1.25x", "--calib", text_file, *SMALL, "-o", output)
    return output


# --- help -----------------------------------------------------------------------------------------


def test_help_names_every_command(run: Run) -> None:
    text = run("--help").stdout
    assert all(re.search(rf"^  {name} ", text, re.MULTILINE) for name in COMMANDS)


def command(name: str) -> click.Command:
    found = commands.get_command(click.Context(commands), name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option_and_gives_examples(name: str, run: Run) -> None:
    text = run(name, "--help").stdout
    assert command(name).name == name
    for parameter in command(name).params:
        assert parameter.opts[0] in text or parameter.human_readable_name in text
        assert parameter.param_type_name == "argument" or getattr(parameter, "help", None)
    assert re.search(rf"Examples:\n +lrsd {name} ", text)


# What `lrsd compress` has besides settings.
NO_SETTINGS = {
    "model",
    "--output",
    "--recipe",
    "--calibration",
    "--resume",
    "--memory",
    "--dry-run",
    "--json",
}


def test_options_of_compress_are_the_settings_and_no_others() -> None:
    """Every field of a settings class is an option, and every option but a few is such a field."""
    found = {parameter.opts[-1]: parameter for parameter in command("compress").params}
    settings = {f"--{field.name.replace('_', '-')}": field for kind in KINDS for field in fields(kind)}
    assert set(found) == NO_SETTINGS | {"--method"} | set(settings)
    for flag, field in settings.items():
        option = found[flag]
        assert isinstance(option, click.Option)
        assert option.name == field.name
        assert field.metadata["help"], f"{field.name} has no help"
        assert option.help, f"{flag} has no help"
        owners = [kind for kind in KINDS if field.name in {f.name for f in fields(kind)}]
        shared = [f for kind in owners for f in fields(kind) if f.name == field.name]
        assert any(option.help.startswith(f.metadata["help"]) for f in shared), flag
        if len(owners) > 1:
            assert set(owners) <= set(METHODS.values()), f"{flag} has two homes"
        if all(get_origin(f.type) is Literal for f in shared):
            choices = {choice for f in shared for choice in get_args(f.type)}
            assert isinstance(option.type, click.Choice)
            assert set(option.type.choices) == choices
    method = found["--method"]
    assert isinstance(method.type, click.Choice)
    assert list(method.type.choices) == list(METHODS)


def test_options_that_only_some_methods_have_say_which() -> None:
    for parameter in command("compress").params:
        having = [name for name, kind in METHODS.items() if parameter.name in {f.name for f in fields(kind)}]
        if having:
            assert isinstance(parameter, click.Option)
            assert f"({', '.join(having)})" in str(parameter.help)


def test_settings_that_are_not_typed_are_the_defaults_of_their_fields() -> None:
    typed = ["MODEL", "--ratio", "2x", "-o", "OUT"]
    context = command("compress").make_context("compress", typed)
    assert given_options(context, context.params).keys() & settings_names() == {"ratio"}
    every = Recipe.of(ratio=2.0).to_dict()
    assert every.keys() == {"method"} | {f.name for kind in (*GROUPS.values(), Lrsd) for f in fields(kind)}
    assert Recipe.of(**every) == Recipe.of(ratio=2.0)


def settings_names() -> set[str]:
    return {field.name for kind in KINDS for field in fields(kind)}


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_reads_back_as_it_was(method: str) -> None:
    recipe = Recipe.of(ratio="80%", method=method, exclude=["*.q_proj"], propagate=False)
    assert Recipe.of(**json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert recipe.method_name == method


HEAVY = ("torch", "transformers", "datasets", "numpy", "lrsd")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """Only `lrsd compress --help` and recover's need settings, which are beside what uses them."""
    allowed = {"lrsd", "torch", "numpy"} if arguments[0] in ("compress", "recover") else set()
    program = (
        "import sys, lrsd_cli.main\n"
        "try: lrsd_cli.main.main()\n"
        "except SystemExit: pass\n"
        f"heavy = { ({*HEAVY} - allowed)!r} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    found = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


def test_help_answers_at_once() -> None:
    """In well under 0.3 s of processor time, the best of three; importing torch alone takes over a second."""
    program = "import lrsd_cli.main; lrsd_cli.main.main()"
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(taken) < 0.25


# --- results on stdout, progress on stderr ----------------------------------------------------------


def test_json_is_alone_on_stdout(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "new"
    text = ("--calib", text_file, *SMALL)
    code, stdout, stderr = lrsd("compress", tiny_model_dir, "--ratio", "80%", *text, "-o", output, "--json")
    assert code == 0, stderr
    written = [json.loads((output / name).read_text()) for name in ("lrsd.json", "run.json")]
    assert json.loads(stdout) == written[0] | written[1]
    assert re.search(r"^observe: 2/2 ", stderr, re.MULTILINE)

    texts = ("--ppl", text_file, "--seqlen", "64", "--windows", "2")
    code, stdout, stderr = lrsd("eval", output, *texts, "--kl", tiny_model_dir, "--speed", "--json")
    assert code == 0, stderr
    found = json.loads(stdout)
    assert found["perplexity"][0]["scored_tokens"] == 2 * 63
    assert found["divergence"][0]["kl"] > 0
    assert min(found["speed"]["prefill"], found["speed"]["decode"]) > 0
    assert re.search(r"^evaluate on .*: 2/2 ", stderr, re.MULTILINE)


def test_bytes_are_within_the_budget_and_as_planned(
    run: Run, compressed: Path, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    text = ("--calib", text_file, *SMALL)
    wanted = ("compress", tiny_model_dir, "--ratio", "1.25x", *text, "-o", tmp_path / "new")
    plan = json.loads(run(*wanted, "--dry-run", "--json").stdout)
    assert list(tmp_path.iterdir()) == []
    assert sum(layer["bytes"] for layer in plan["layers"].values()) == plan["planned_bytes"]
    assert plan["planned_bytes"] <= plan["budget_bytes"] == int(plan["dense_linear_bytes"] / 1.25)

    manifest = json.loads(run("inspect", compressed, "--json").stdout)
    # The size of entropy-coded layers is known only once they are rounded.
    assert 0.999 * plan["budget_bytes"] <= manifest["linear_bytes"] <= plan["budget_bytes"]
    tensors = load_file(compressed / "model.safetensors")
    stored = sum(
        tensor.nbytes for name, tensor in tensors.items() if name.rpartition(".")[0] in manifest["layers"]
    )
    assert stored == manifest["linear_bytes"]


def test_dry_run_needs_no_output_and_shows_every_layer(
    run: Run, compressed: Path, tiny_model_dir: Path, text_file: Path
) -> None:
    table = run("compress", tiny_model_dir, "--ratio", "2", "--calib", text_file, *SMALL, "--dry-run").stdout
    layers = json.loads((compressed / "lrsd.json").read_text())["layers"]
    assert all(f"\n{name} " in table for name in layers)


def test_inspect_shows_every_layer_and_draws_them(run: Run, compressed: Path, tmp_path: Path) -> None:
    picture = tmp_path / "layers.png"
    table = run("inspect", compressed, "--plot", picture, "--memory").stdout
    assert "runs in         transformers after `import lrsd`" in table
    held = float(re.search(r"in memory       ([\d.]+) bits", table)[1])  # type: ignore[index]
    assert 1 < held < 20
    told = json.loads(run("inspect", compressed, "--memory", "--json").stdout)["resident_bits"]
    assert told == pytest.approx(held, rel=0.01)
    manifest = json.loads((compressed / "lrsd.json").read_text())
    assert all(f"\n{name} " in table for name in manifest["layers"])
    assert f"{manifest['ratio']:.4g}x" in table
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_export_evaluates_like_what_it_was_made_of(
    run: Run, compressed: Path, text_file: Path, tmp_path: Path
) -> None:
    run("export", compressed, "--dense", tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    texts = ("--ppl", text_file, "--seqlen", "64", "--windows", "2", "--dtype", "float32")
    found = json.loads(run("eval", tmp_path / "dense", *texts, "--kl", compressed, "--json").stdout)
    # The dense weights are rounded to bfloat16 once more, the packed ones are not: 2^-9 relative.
    assert found["divergence"][0]["kl"] < 1e-3


# --- settings ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_recipe_of_a_checkpoint_makes_it_again(
    run: Run, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    changed = (
        "--bits",
        "16",
        "--structure",
        "column",
        "--mean-correction",
        "--no-propagate",
        "--seed",
        "7",
    )
    run("compress", tiny_model_dir, "--ratio", "1.5", "--calib", text_file, *SMALL, *changed, "-o", first)
    run("compress", tiny_model_dir, "--recipe", first / "recipe.json", "-o", second)
    assert same_checkpoint(first, second)
    assert (first / "recipe.json").read_bytes() == (second / "recipe.json").read_bytes()


def test_a_mixture_of_texts_is_named_in_full_and_made_again_by_its_recipe(
    run: Run, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    text, paths = text_file.read_text(), [tmp_path / "one.txt", tmp_path / "other.txt"]
    for path, half in zip(paths, (text[:30_000], text[30_000:]), strict=True):
        path.write_text(half)
    first, second, alone = tmp_path / "first", tmp_path / "second", tmp_path / "alone"
    sources = [word for path in paths for word in ("--calib", path)]
    run("compress", tiny_model_dir, "--ratio", "1.5", *sources, *SMALL, "-o", first)
    assert json.loads((first / "recipe.json").read_text())["calib"] == [*map(str, paths)]
    assert f"({paths[0]}, {paths[1]})" in (first / "README.md").read_text()
    run("compress", tiny_model_dir, "--recipe", first / "recipe.json", "-o", second)
    assert same_checkpoint(first, second)
    # What is typed takes the place of all texts of the recipe.
    run("compress", tiny_model_dir, "--recipe", first / "recipe.json", "--calib", paths[0], "-o", alone)
    assert json.loads((alone / "recipe.json").read_text())["calib"] == str(paths[0])
    assert not same_checkpoint(first, alone)


def test_what_is_typed_wins_over_the_recipe(
    run: Run, compressed: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    settings = json.loads((compressed / "recipe.json").read_text()) | {"ratio": 3}
    recipe.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in settings.items() if v is not None))
    run("compress", tiny_model_dir, "--recipe", recipe, "--ratio", "1.25", "-o", tmp_path / "new")
    assert same_checkpoint(compressed, tmp_path / "new")


@pytest.mark.parametrize("ratio", ["1.25", "80%"])
def test_every_form_of_a_ratio_means_the_same(
    ratio: str, run: Run, compressed: Path, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    run("compress", tiny_model_dir, "--ratio", ratio, "--calib", text_file, *SMALL, "-o", tmp_path / "new")
    assert same_checkpoint(compressed, tmp_path / "new")


def same_checkpoint(one: Path, other: Path) -> bool:
    """The same tensors, byte by byte, and the same layers in the manifest; times may differ."""
    layers = [json.loads((path / "lrsd.json").read_text())["layers"] for path in (one, other)]
    weights = [(path / "model.safetensors").read_bytes() for path in (one, other)]
    return layers[0] == layers[1] and weights[0] == weights[1]


# --- interruption -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_leaves_nothing_behind(
    number: signal.Signals, code: int, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    # Enough samples that the calibration pass outlasts the moment the signal takes to arrive.
    size = ("--samples", "160", "--seqlen", "256")
    process = start(
        "compress", tiny_model_dir, "--ratio", "2", "--calib", text_file, *size, "-o", tmp_path / "new"
    )
    assert process.stderr is not None
    assert ": lrsd compress " in process.stderr.readline()
    assert "of disk" in process.stderr.readline()
    assert process.stderr.readline() == "observe: 2 steps\n"
    process.send_signal(number)
    stdout, stderr = process.communicate()
    assert process.returncode == code
    assert stdout == ""
    assert len(stderr.split("\n")) <= 3, stderr  # the line, and the one that ends ^C
    assert stderr.strip().endswith("; nothing was written")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_signal_amid_a_line_of_progress_stops_as_any_other(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    """The stream sends SIGTERM to its own process while it writes its first line."""
    program = """
import io, os, signal, sys
class Raw(io.FileIO):
    sent = False
    def write(self, data):
        written = super().write(data)
        if not Raw.sent and b"observe" in bytes(data):
            Raw.sent = True
            os.kill(os.getpid(), signal.SIGTERM)
        return written
sys.stderr = io.TextIOWrapper(io.BufferedWriter(Raw(2, "w")), line_buffering=True)
from lrsd_cli.main import main
main()
"""
    arguments = ["compress", tiny_model_dir, "--ratio", "2", "--calib", text_file, *SMALL]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments), "-o", tmp_path / "new"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 143
    assert done.stderr.splitlines()[-1] == "terminated; nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_verify_names_what_is_missing_or_changed(run: Run, compressed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(compressed, copy)
    (copy / "README.md").write_text("a card of one's own")
    assert "files are as lrsd" in run("verify", copy).stdout
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.json missing; model.safetensors changed; copy"):
        run("verify", copy)
    manifest = json.loads((copy / "lrsd.json").read_text())
    (copy / "lrsd.json").write_text(json.dumps(manifest | {"files": {}}))
    with pytest.raises(CheckpointError, match="holds no digests"):
        run("verify", copy)


def test_full_memory_of_an_accelerator_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: object, **named: object) -> None:
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it.")
        error.add_note("finished work is kept in out.partial")
        raise error

    monkeypatch.setattr(commands, "main", fails)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        "lrsd: CUDA out of memory. Tried to allocate 2.00 GiB. Lower --batch, or take a CPU with --device "
        "cpu; finished work is kept in out.partial\n"
    )
