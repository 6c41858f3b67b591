"""Tasks of lm-evaluation-harness on dense and compressed models: what is asked, what is refused, and what it
comes to."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from lm_eval.tasks import manager
from lrsd_cli.main import commands
from torch.nn.functional import log_softmax
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, BertConfig, T5Config

from lrsd.compress import compress
from lrsd.errors import InputError, NumericsError
from lrsd.evaluate import EvalResult, evaluate
from lrsd.export.dense import export_dense
from lrsd.model.load import LoadedModel, load_model
from lrsd.recipe import Recipe
from lrsd.report import tables
from lrsd.runtimes.lm_eval import TaskScore, mean_interval, open_tasks, run_tasks, task_scores

ITEM = {"context": "The cat", "choices": ["sat down.", "is a dog."], "answer": 0}


@pytest.fixture(scope="module")
def items(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of whatever the text holds; the second choice is the longest, the answers are all of them."""
    words = text_file.read_text().split()
    path = tmp_path_factory.mktemp("items") / "items.jsonl"
    rows = [
        {
            "context": " ".join(words[place : place + 8]),
            "choices": [" ".join(words[place + 8 + 9 * k :][: 3 + k % 2]) for k in range(3)],
            "answer": place % 3,
        }
        for place in range(0, 1200, 50)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def small(tiny_model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embedding and head in 8 bit, too."""
    out = tmp_path_factory.mktemp("small") / "out"
    recipe = Recipe.of(ratio=2, scope="checkpoint", calib=str(text_file), samples=8, seqlen=32)
    compress(str(tiny_model_dir), out, recipe)
    return out


def likelihoods(loaded: LoadedModel, source: Path) -> list[list[float]]:
    """Own loop over the rows of a file: of every choice, after the context and a space."""
    found = []
    for row in map(json.loads, source.read_text().splitlines()):
        start = len(loaded.tokenizer(row["context"]).input_ids)
        found.append([])
        for choice in row["choices"]:
            ids = torch.tensor(loaded.tokenizer(f"{row['context']} {choice}").input_ids)
            with torch.inference_mode():
                logits = loaded.model(ids[None]).logits[0].float()
            steps = log_softmax(logits, -1)[range(start - 1, len(ids) - 1), ids[start:]]
            found[-1].append(float(steps.sum()))
    return found


def asked(results: dict[str, Any], source: Path) -> torch.Tensor:
    return torch.tensor([
        [value for value, _ in sample["filtered_resps"]] for sample in results["samples"][str(source)]
    ])  # fmt: skip


@pytest.mark.parametrize("batch", [1, 8])
def test_accuracy_is_that_of_a_loop_over_likelihoods(tiny_model_dir: Path, items: Path, batch: int) -> None:
    loaded = load_model(str(tiny_model_dir), dtype="float32")
    before = loaded.require_tokenizer().pad_token
    results = run_tasks(loaded, open_tasks([str(items)]), batch=batch)
    expected = likelihoods(loaded, items)
    torch.testing.assert_close(asked(results, items), torch.tensor(expected), rtol=1e-4, atol=1e-3)
    rows = [json.loads(line) for line in items.read_text().splitlines()]
    right = [float(np.argmax(found) == row["answer"]) for found, row in zip(expected, rows, strict=True)]
    normed = [
        float(np.argmax(np.array(found) / [len(c) for c in row["choices"]]) == row["answer"])
        for found, row in zip(expected, rows, strict=True)
    ]
    plain, by_length = task_scores(results)
    assert (plain.metric, by_length.metric) == ("acc", "acc_norm")
    assert (plain.task, plain.items, plain.shots) == (str(items), len(rows), 0)
    assert (list(plain.per_item), list(by_length.per_item)) == (right, normed)
    assert plain.score == pytest.approx(np.mean(right))
    assert 0 < plain.score < 1
    assert plain.low is not None
    assert plain.high is not None
    assert 0 <= plain.low < plain.score < plain.high <= 1
    assert loaded.require_tokenizer().pad_token == before


def test_a_compressed_checkpoint_answers_as_its_dense_export(
    small: Path, items: Path, tmp_path: Path
) -> None:
    export_dense(small, tmp_path / "dense")
    packed, dense = (
        run_tasks(load_model(str(path), dtype="float32"), open_tasks([str(items)]))
        for path in (small, tmp_path / "dense")
    )
    # The export is rounded to 16 bit.
    torch.testing.assert_close(asked(packed, items), asked(dense, items), rtol=2e-3, atol=0.05)
    assert [s.per_item for s in task_scores(packed)] == [s.per_item for s in task_scores(dense)]


def test_the_command_prints_intervals_and_gives_json(small: Path, items: Path) -> None:
    words = ["eval", str(small), "--tasks", str(items), "--limit", "5"]
    found = CliRunner().invoke(commands, [*words, "--json"])
    assert found.exit_code == 0, found.output
    plain, _ = json.loads(found.stdout)["tasks"]
    assert (plain["metric"], plain["items"], len(plain["per_item"])) == ("acc", 5, 5)
    assert json.loads(found.stdout)["perplexity"] == []
    assert "tasks: 1/1" in found.stderr
    assert "\r" not in found.stderr
    result = EvalResult(
        model="", perplexity=(), divergence=(), accuracy=None, speed=None, tasks=(TaskScore(**plain),)
    )
    (line,) = tables.evaluation_lines(result)
    for number in ("score", "low", "high"):
        assert f"{plain[number]:.4f}" in line
    without = CliRunner().invoke(commands, ["eval", str(small), "--limit", "5"])
    assert without.exit_code == 2
    assert "--limit and --trust-tasks need --tasks" in without.output


def test_an_encoder_decoder_answers_too(make_model: Any, items: Path) -> None:
    config = T5Config(
        vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    result = evaluate(str(make_model(config, AutoModelForSeq2SeqLM)), [], tasks=[str(items)], limit=4)
    assert [score.items for score in result.tasks] == [4, 4]


def test_what_it_needs_of_the_process_is_given_back(tiny_model_dir: Path, items: Path) -> None:
    loaded, tasks = load_model(str(tiny_model_dir)), open_tasks([str(items)])
    states = []
    for work in (lambda: None, lambda: run_tasks(loaded, tasks, limit=2)):
        random.seed(7), np.random.seed(7), torch.manual_seed(7)
        work()
        states.append((random.random(), np.random.random(), float(torch.rand(()))))
    assert states[0] == states[1]


def test_an_interval_holds_its_mean() -> None:
    for values in ([1.0] * 9, [0.0, 1.0], [0.0] * 30 + [1.0] * 70):
        low, high = mean_interval(values)
        assert low is not None
        assert high is not None
        assert low <= np.mean(values) <= high
    low, high = mean_interval([0.0] * 120 + [1.0] * 280)
    deviation = 1.96 * (0.3 * 0.7 / 400) ** 0.5
    assert (low, high) == (pytest.approx(0.7 - deviation, abs=0.01), pytest.approx(0.7 + deviation, abs=0.01))
    assert mean_interval([1.0]) == (None, None)


def test_likelihoods_that_are_no_numbers_are_an_error(tiny_model_dir: Path, items: Path) -> None:
    loaded = load_model(str(tiny_model_dir))
    with torch.no_grad():
        loaded.model.model.norm.weight[0] = torch.nan
    with pytest.raises(NumericsError, match="non-finite likelihoods in item 1 of"):
        run_tasks(loaded, open_tasks([str(items)]), limit=2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"choices": "ab"}, 'expected an object with a text as "context"'),
        ({"answer": True}, 'expected an object with a text as "context"'),
        ({"answer": 2}, "expected an answer from 0 to 1, got 2"),
        ({"answer": -1}, "expected an answer from 0 to 1, got -1"),
        ({"choices": ["a", "a"]}, "two or more different choices"),
        ({"choices": ["a"]}, "two or more different choices"),
        ({"choices": ["a", " "]}, "an empty one"),
        ({"choices": ["a", 3]}, "an empty one"),
        ({"context": None}, 'expected an object with a text as "context"'),
    ],
)
def test_rows_that_are_no_items_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(ITEM) + "\n" + json.dumps(ITEM | change) + "\n")
    with pytest.raises(InputError, match=said) as error:
        open_tasks([str(path)])
    assert f"{path}:2" in str(error.value)
    assert "\n" not in str(error.value)


def test_items_are_texts_and_no_templates(tiny_model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "items.json"
    path.write_text(json.dumps([ITEM | {"context": "{{ 1 // 0 }}", "choices": ["{{ 1 // 0 }}", "[1, 2]"]}]))
    tasks = open_tasks([str(path)])
    results = run_tasks(load_model(str(tiny_model_dir)), tasks)
    (sample,) = results["samples"][str(path)]
    assert sample["arguments"] == [("{{ 1 // 0 }}", " {{ 1 // 0 }}"), ("{{ 1 // 0 }}", " [1, 2]")]


CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\ndef rows(docs):\n    return docs\n"
TASK = """task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
process_docs: !function code.rows
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
"""


def test_code_of_a_task_runs_only_if_it_is_trusted(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without lm-eval's own 15,000 tasks, whose files take many seconds to read.
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "none" / "manager.py"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "data.json").write_text(json.dumps(ITEM))
    task = tmp_path / "task.yaml"
    task.write_text(TASK.replace("DATA", str(tmp_path / "data.json")))
    with pytest.raises(InputError, match="may run any code; read it, and add --trust-tasks") as error:
        open_tasks([str(task)])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    results = run_tasks(load_model(str(tiny_model_dir)), open_tasks([str(task)], trusted=True))
    assert (tmp_path / "ran").exists()
    assert [score.metric for score in task_scores(results)] == ["acc", "acc_norm"]


def test_unknown_names_and_data_out_of_reach_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "manager.py"))
    task = {"task": "arc_easy", "dataset_path": "owner/none", "test_split": "test", "doc_to_text": "a"}
    (tmp_path / "one.yaml").write_text(json.dumps(task | {"tag": "easy"}))
    (tmp_path / "two.yaml").write_text(json.dumps(task | {"task": "hellaswag"}))
    with pytest.raises(
        InputError, match=r"no task 'arc_esy'\. Did you mean arc_easy, easy\? Available: 3 \("
    ) as error:
        open_tasks(["hellaswag,arc_esy"])
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"lm-eval cannot open hellaswag \(.*needs no network$") as error:
        open_tasks(["hellaswag"])
    assert "\n" not in str(error.value)
    for missing, said in (("none.jsonl", "'none.jsonl'; there is no such"), ("none.yaml", "no file 'none.y")):
        with pytest.raises(InputError, match=said):
            open_tasks([f"hellaswag,{missing}"])
    with pytest.raises(InputError, match="got nothing"):
        open_tasks([","])


def test_groups_and_tasks_that_are_no_multiple_choice(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "manager.py"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps(ITEM | {"answer": n % 2}) + "\n" for n in range(6))
    )
    choice = TASK.replace("DATA", str(tmp_path / "data.jsonl")).replace(
        "process_docs: !function code.rows\n", ""
    )
    words = choice.replace("doc_to_target: answer", 'doc_to_target: "{{choices[0]}}"').replace(
        "doc_to_choice: choices\n", ""
    )
    written = "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    read = "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]\n"
    tasks = {
        "one": choice,
        "two": choice,
        "writes": words.replace("multiple_choice", "generate_until")
        + "generation_kwargs: {until: ['.'], max_gen_toks: 3}\n" + written,
        "reads": words.replace("multiple_choice", "loglikelihood") + read,
        "both": "group: both\ntask: [one, two]\naggregate_metric_list: [{metric: acc}]\n",
    }  # fmt: skip
    for name, text in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(text.replace("task: mine", f"task: {name}"))
    results = run_tasks(load_model(str(tiny_model_dir)), open_tasks(["both,writes", "reads"]), limit=4)
    found = {(score.task, score.metric): score for score in task_scores(results)}
    assert (found["both", "acc"].score, found["one", "acc"].score) == (0.5, 0.5)
    for name, bounded in (("one", True), ("both", True), ("reads", False)):
        score = found[name, "acc" if bounded else "perplexity"]
        assert score.low is not None
        assert score.low <= score.score <= (score.high or 0)
        assert bool(score.per_item) == (name == "one")
    assert found["writes", "exact_match"].items == 4
    assert capsys.readouterr().out == ""


def test_a_request_that_is_cut_is_told_once(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(ITEM | {"context": text_file.read_text()[:3000]}) + "\n")
    run_tasks(load_model(str(tiny_model_dir)), open_tasks([str(path)]))
    assert capsys.readouterr().err.count("exceeds model's maximum length (256)") == 1


def test_without_the_package_a_line_says_how_to_get_it(items: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"pip install 'lrsd\[tasks\]'"):
        open_tasks([str(items)])


def test_an_encoder_is_given_no_tasks(make_model: Any, items: Path) -> None:
    config = BertConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    with pytest.raises(InputError, match="no tasks to a masked language model"):
        evaluate(str(make_model(config, AutoModelForMaskedLM)), [], tasks=[str(items)])
