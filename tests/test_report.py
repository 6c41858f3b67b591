"""The report: one page that loads nothing, runs nothing, and accounts for every byte."""

import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from families import BERT_LIKE, EXPERTS
from gguf_files import write_llama
from lrsd_cli.main import commands
from transformers import AutoModelForMaskedLM, BertConfig, LlamaConfig, MixtralConfig

from lrsd.checkpoint.manifest import LayerRecord, Manifest, read_manifest, write_manifest
from lrsd.checkpoint.reader import StoredModel, stored_bytes, stored_weights
from lrsd.checkpoint.verify import digests, verify
from lrsd.compress import compress
from lrsd.errors import CheckpointError, InputError
from lrsd.export.dense import export_dense
from lrsd.forms.base import Shape
from lrsd.forms.layer import parse_layer
from lrsd.recipe import Recipe
from lrsd.report.facts import facts_of
from lrsd.report.heat import QUANTITIES, Scale
from lrsd.report.page import page, report_path, write_report
from lrsd.report.spectra import singular_values, spectra_of
from lrsd.report.svg import STEPS

TEXT = {"samples": 4, "seqlen": 32}
# Elements that HTML never closes.
VOID = {"meta", "link", "wbr"}


class Structure(HTMLParser):
    """Elements and attributes of a page. Fails on elements that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def results(
    make_model: Any,
    tiny_llama: Callable[..., LlamaConfig],
    tokenizer: Any,
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """A small result of each kind, made when it is first asked for."""
    place = tmp_path_factory.mktemp("results")
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        small = tiny_llama(num_hidden_layers=1, intermediate_size=96)
        source, settings = {
            "coded": (lambda: make_model(small), {"ratio": 3, "propagate": False}),
            "16 bit": (lambda: make_model(small), {"ratio": 1.5, "bits": "16", "propagate": False}),
            "uniform": (lambda: make_model(small), {"ratio": 1.5, "bits": "16", "allocation": "uniform"}),
            "experts": (
                lambda: make_model(MixtralConfig(**EXPERTS | {"num_hidden_layers": 1})),
                {"ratio": 2, "propagate": False},
            ),
            "encoder": (
                lambda: make_model(BertConfig(**BERT_LIKE | {"num_hidden_layers": 1}), AutoModelForMaskedLM),
                {"ratio": 2, "propagate": False, "bits": "16"},
            ),
            "gguf": (
                lambda: write_llama(
                    place / "base.gguf", tiny_llama(num_hidden_layers=1), tokenizer, np.float16
                ),
                {"ratio": 2, "format": "gguf", "propagate": False, "types": "Q4_0,Q8_0", "sweeps": 1},
            ),
            "compressed-tensors": (
                lambda: make_model(small),
                {"ratio": 3, "format": "compressed-tensors", "propagate": False, "sweeps": 1},
            ),
        }[kind]  # fmt: skip
        output = place / f"{kind}.gguf" if kind == "gguf" else place / kind
        compress(str(source()), output, Recipe.of(calib=str(text_file), **TEXT, **settings))
        return output

    return lambda kind: made[kind] if kind in made else made.setdefault(kind, make(kind))


@pytest.fixture(scope="module")
def drawn(results: Callable[[str], Path]) -> Callable[[str], str]:
    """Its report, drawn once."""
    texts: dict[str, str] = {}

    def draw(kind: str) -> str:
        if kind not in texts:
            texts[kind] = write_report(results(kind)).read_text(encoding="utf-8")
        return texts[kind]

    return draw


KINDS = ("coded", "16 bit", "uniform", "experts", "encoder", "gguf", "compressed-tensors")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_result_is_drawn_and_every_byte_accounted_for(
    kind: str, results: Callable[[str], Path], drawn: Callable[[str], str]
) -> None:
    result, text = results(kind), drawn(kind)
    manifest = read_manifest(result)
    found = Structure(text)
    table = {
        re.sub(r"<[^>]*>", "", name): int(count.replace(",", ""))
        for name, count in re.findall(
            r"<tr><td>(.*?)</td><td class=\"n\">(?:<b>)?([\d,]+)(?:</b>)?</td>", text
        )
    }
    whole = result.stat().st_size if result.is_file() else stored_bytes(result)
    layers, rest, total = (table.pop(n) for n in (
        f"all {len(manifest.layers)} layers",
        f"all else: {'norms, metadata, tokenizer' if kind == 'gguf' else 'embeddings, norms, head'}",
        "checkpoint",
    ))  # fmt: skip
    assert layers == sum(table.values()) == manifest.linear_bytes
    assert total == layers + rest == whole
    assert "stored" not in table, "what the bytes are is known"
    # A map of every quantity, of as many cells as there are layers, experts together; spectra of all of them.
    facts = facts_of(manifest, whole)
    quantities = set(re.findall(r"<h3>(.*?)</h3>", text)) & {q.title for q in QUANTITIES}
    assert {"Bits per weight", "Output error"} <= quantities
    assert ("Sensitivity" in quantities) == (kind != "uniform")
    titles = [tag for tag, _ in found.tags].count("title")
    assert titles >= 1 + len(quantities) * len(facts.cells)
    assert 'aria-label="Singular values of stored weights"' in text
    assert ('aria-label="Error after every round' in text) == any(
        len(layer.history) > 1 for layer in manifest.layers.values()
    )


@pytest.mark.parametrize("kind", ["coded", "16 bit"])
def test_it_loads_nothing_and_runs_nothing(kind: str, drawn: Callable[[str], str]) -> None:
    text = drawn(kind)
    assert_harmless(Structure(text))
    assert re.findall(r"https?:|@import|javascript:|url\((?!#)", text) == []
    # Colors are the page's, in both themes, and none is missing.
    light, dark = (
        set(re.findall(r"(--\w+):", part)) for part in text.split("prefers-color-scheme: dark")[:2]
    )
    used = set(re.findall(r"var\((--\w+)\)", text))
    assert used - {"--font", "--mono"} <= light & dark
    assert used <= light
    assert re.findall(r"#0000[0-9a-f]{2}", text.partition("</style>")[2]) == []


def assert_harmless(found: Structure) -> None:
    assert {tag for tag, _ in found.tags} & {
        "script",
        "iframe",
        "object",
        "embed",
        "img",
        "image",
        "form",
    } == set()
    for _, name, value in found.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "action", "srcset"):
            assert value.startswith("#") or value == "data:,"
    assert ("meta", "http-equiv", "Content-Security-Policy") in found.attributes


HOSTILE = (
    "</svg></style><script>alert(1)</script>", '"onload="alert(1)', "{{ 7 * 7 }}", r"$\frac{$", "_hidden",
    "\0\x1b\u202eevil",
    "#000003", "&lt;b&gt;", "<!--", "]]>", "a." * 3000, "", "模型", "</title><g id=\"step0\">",
)  # fmt: skip


def test_names_of_an_untrusted_checkpoint_are_text(results: Callable[[str], Path]) -> None:
    """With the worst of names the page has the elements that it has with harmless ones."""
    manifest = read_manifest(results("16 bit"))
    records = [*manifest.layers.values()]

    def named(names: list[str]) -> Structure:
        layers = {f"model.layers.0.{n}.{name}": records[n % 7] for n, name in enumerate(names)}
        layers |= {name: replace(records[0], reason=f"since {name}", state=name) for name in names}
        harmful = replace(
            manifest, layers=layers, base_model=names[0], lrsd_version=names[0], base_stored_as=names[4],
            text=names[0], model_class=names[1], untouched={name: name for name in names},
            recipe=manifest.recipe
            | {name: f"so {name}" for name in names}
            | {"calib": names, "method": names[0]},
            environment={name: name for name in names}, allocation=dict.fromkeys(names, 1.0),
            allocation_chosen=names[0],
        )  # fmt: skip
        found = Structure(page(harmful, facts_of(harmful, 10**6)))
        assert_harmless(found)
        return found

    harmful, harmless = named([*HOSTILE]), named([f"n{number}" for number in range(len(HOSTILE))])
    without = [[tag for tag in found.tags if tag[0] != "wbr"] for found in (harmful, harmless)]
    # Ticks and clip paths depend on the room that labels take.
    drawing = {"g", "use", "path", "defs", "text", "clippath", "rect"}
    counts = [Counter(tag for tag in tags if tag[0] not in drawing) for tags in without]
    assert counts[0] == counts[1]
    shown = "".join(harmful.text)
    assert HOSTILE[0] in shown
    assert "alert(1)" not in "".join(value for *_, value in harmful.attributes)
    assert "\u202e" not in shown
    assert 'AutoModel.from_pretrained("OUT")' in shown, "what is copied into a program is a name"


@pytest.mark.parametrize(
    "damage",
    [{"out_features": 0}, {"in_features": -4}, {"bytes": -1}, {"dense_bytes": 0}, {"bytes": 2**60}],
)
def test_impossible_sizes_are_one_line(damage: dict[str, int], results: Callable[[str], Path]) -> None:
    manifest = read_manifest(results("16 bit"))
    name = next(iter(manifest.layers))
    layers = manifest.layers | {name: replace(manifest.layers[name], **damage)}  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=re.escape(repr(name))):
        facts_of(replace(manifest, layers=layers), 0)


def test_numbers_that_are_none_are_drawn_as_nothing(results: Callable[[str], Path]) -> None:
    manifest = read_manifest(results("16 bit"))
    nan, inf = float("nan"), float("inf")
    odd = [(nan, 1.0), (inf, inf), (0.0, 0.0), (-1.0, 1e300), (1e-300, 1e-300), (1e300, 1e-9), (1.0, nan)]
    assert len(odd) == len(manifest.layers)
    for pairs in (odd, [odd[1]] * 7, [odd[2]] * 7):
        layers = {
            name: replace(record, error=error, sensitivity=sensitivity, history=(error, 1.0))
            for (name, record), (error, sensitivity) in zip(manifest.layers.items(), pairs, strict=True)
        }
        changed = replace(manifest, layers=layers)
        Structure(page(changed, facts_of(changed, 0)))


def test_the_same_result_gives_the_same_page_whatever_it_is_called(
    results: Callable[[str], Path], drawn: Callable[[str], str], tmp_path: Path
) -> None:
    first = drawn("16 bit").encode()
    copy = tmp_path / "elsewhere"
    shutil.copytree(results("16 bit"), copy)
    write_manifest(copy, replace(read_manifest(copy), seconds={"fit": 1e6}, memory={"peak": 1}))
    assert write_report(copy).read_bytes() == first
    assert str(tmp_path).encode() not in first


# --- beside a result ------------------------------------------------------------------------------


def lrsd(*arguments: object) -> Result:
    return CliRunner().invoke(commands, [str(word) for word in arguments])


def asked(source: Path, text: Path, output: Path) -> list[object]:
    text_and_size = ["--calib", text, "--samples", "4", "--seqlen", "32"]
    quick = ["--bits", "16", "--allocation", "uniform", "--no-propagate", "--alternations", "1"]
    return ["compress", source, "--ratio", "1.5", *text_and_size, *quick, "-o", output]


def test_it_is_written_beside_every_result_and_belongs_to_no_other(
    make_model: Any, tiny_llama: Any, text_file: Path, tmp_path: Path
) -> None:
    base, out = make_model(tiny_llama(num_hidden_layers=1)), tmp_path / "out"
    (base / "report.html").write_text("of an earlier run")
    done = lrsd(*asked(base, text_file, out))
    assert done.exit_code == 0
    assert f"report          {out / 'report.html'}" in done.stdout
    drawn = (out / "report.html").read_bytes()
    assert b"of an earlier run" not in drawn
    # What people do to it, the manifest does not vouch for; a finished command leaves it, or draws it again.
    assert "report.html" not in verify(out).files
    (out / "report.html").write_text("notes of one's own")
    assert "report.html" not in {*verify(out).files, *digests(out)}
    assert lrsd(*asked(base, text_file, out), "--resume").exit_code == 0
    assert (out / "report.html").read_text() == "notes of one's own"
    (out / "report.html").unlink()
    assert lrsd(*asked(base, text_file, out), "--resume").exit_code == 0
    assert (out / "report.html").read_bytes() == drawn
    export_dense(out, tmp_path / "dense")
    assert not (tmp_path / "dense" / "report.html").exists()


@pytest.mark.parametrize("failure", [ValueError("no\nink"), MemoryError(), ImportError("no matplotlib")])
def test_what_goes_wrong_in_drawing_never_costs_the_result(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, text_file: Path,
    make_model: Any, tiny_llama: Any, tmp_path: Path,
) -> None:  # fmt: skip
    def fails(*arguments: object) -> None:
        raise failure

    monkeypatch.setattr("lrsd.report.page.page", fails)
    done = lrsd(*asked(make_model(tiny_llama(num_hidden_layers=1)), text_file, tmp_path / "out"), "--json")
    assert done.exit_code == 0
    (line,) = [line for line in done.stderr.splitlines() if "no report beside" in line]
    assert f"`lrsd report {tmp_path / 'out'}` draws it" in line
    assert json.loads(done.stdout)["layers"]
    verify(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir() if "report" in path.name] == []


def test_an_interrupted_drawing_says_that_the_result_is_there(
    results: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    from lrsd.report.page import write_beside

    report_path(results("coded")).unlink(missing_ok=True)
    monkeypatch.setattr("lrsd.report.page.page", stop)
    with pytest.raises(KeyboardInterrupt) as stopped:
        write_beside(results("coded"), print)
    assert "is complete but for its report" in stopped.value.__notes__[0]


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_without_its_libraries_it_is_one_line(
    library: str, results: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=rf"needs {library}: pip install 'lrsd\[report\]'"):
        write_report(results("16 bit"))


def test_only_reports_are_replaced(results: Callable[[str], Path], tmp_path: Path) -> None:
    result = tmp_path / "out"
    shutil.copytree(results("16 bit"), result)
    with pytest.raises(InputError, match="is no report"):
        write_report(result, result / "model.safetensors")
    verify(result)
    write_report(result)
    drawn = (result / "report.html").stat().st_ino
    write_report(result)
    assert (result / "report.html").stat().st_ino != drawn
    assert report_path(results("gguf")).name == "gguf.report.html"


def test_evaluations_are_rows(results: Callable[[str], Path], tmp_path: Path) -> None:
    score = {
        "perplexity": 25.904,
        "text": "/data/wiki.test.raw",
        "windows": 12,
        "seqlen": 512,
        "scored_tokens": 6132,
        "protocol": "p",
    }
    distance = {
        "kl": 0.03141,
        "measure": "KL",
        "top1_agreement": 0.907,
        "scored_tokens": 6132,
        "text": score["text"],
    }
    content = {
        "model": "smol-4x",
        "perplexity": [score],
        "divergence": [distance],
        "accuracy": None,
        "speed": None,
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "b.json").write_text(json.dumps(content | {"model": "org/dense", "divergence": []}))
    done = lrsd(
        "report", results("16 bit"), "-o", tmp_path / "page.html",
        "--eval", tmp_path / "a.json", "--eval", tmp_path / "b.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    text = (tmp_path / "page.html").read_text()
    assert re.findall(r">(smol-4x|org/dense)</td><td class=\"name\">wiki\.test\.raw<", text) == [
        "smol-4x",
        "org/dense",
    ]
    for number in ("25.9", "0.03141", "90.7%"):
        assert f'<td class="n">{number}</td>' in text
    (tmp_path / "a.json").write_text(json.dumps(content | {"perplexity": "all"}))
    with pytest.raises(InputError, match="is not what lrsd eval --json prints"):
        write_report(results("16 bit"), tmp_path / "page.html", [tmp_path / "a.json"])


# --- what the pictures show -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["coded", "16 bit", "experts", "encoder"])
def test_stored_weights_are_those_of_the_checkpoint(kind: str, results: Callable[[str], Path]) -> None:
    result = results(kind)
    model, layers = StoredModel(result), read_manifest(result).layers
    found = dict(stored_weights(result, layers))
    assert found.keys() == layers.keys()
    for name, W_OI in found.items():
        if (packed := model.layer(name).packed) is not None:
            assert torch.equal(W_OI, packed.dense_weight())


def test_spectra_are_the_singular_values_of_the_stored_weights(results: Callable[[str], Path]) -> None:
    for kind in ("16 bit", "compressed-tensors"):
        manifest = read_manifest(results(kind))
        weights = dict(stored_weights(results(kind), manifest.layers))
        spectra = spectra_of(facts_of(manifest, 0), results(kind))
        assert len(spectra) == 7
        for spectrum in spectra:
            (name,) = [name for name in weights if name.endswith(spectrum.label)]
            expected = torch.linalg.svdvals(weights[name].double()).numpy()
            np.testing.assert_allclose(spectrum.values, expected, rtol=1e-6, atol=1e-7 * expected[0])
    assert len(singular_values(torch.full((3, 3), torch.nan))) == 0


def test_a_scale_covers_what_it_is_made_of(generator: torch.Generator) -> None:
    for spread in (1e-3, 1.0, 5.0, 30.0):
        values = torch.randn(50, generator=generator).mul(spread).exp().tolist()
        scale = Scale.of(values)
        steps = [scale.step(value) for value in sorted(values)]
        assert steps == sorted(steps)
        assert (steps[0], steps[-1]) == (0, STEPS - 1)
        assert scale.step(scale.at(0.49)) == scale.step(scale.at(0.45))
    assert Scale.of([3.0, 3.0]).step(3.0) == STEPS // 2


def test_layers_are_told_apart_by_as_little_as_it_takes() -> None:
    names = [
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.experts.0.w1",
        "model.layers.0.mlp.experts.7.w1", "lm_head", "model.layers.0.mlp.shared.w1",
    ]  # fmt: skip
    found = kinds_of(names)
    expert, shared = ("experts.*.w1", 0), ("shared.w1", 0)
    expected = [("q_proj", 0), ("q_proj", 1), expert, expert, ("lm_head", None), shared]
    assert [found[name] for name in names] == expected
    two = kinds_of([f"{stack}.block.3.layer.{n}.q" for stack in ("encoder", "decoder") for n in (0, 1)])
    assert {kind for kind, _ in two.values()} == {"encoder q", "decoder q"}


def kinds_of(names: list[str]) -> dict[str, tuple[str, int | None]]:
    record = LayerRecord(4, 4, None, {}, 32, 32, 0.0, 0.0, 0.0, 0.0, "exact")
    facts = facts_of(many(dict.fromkeys(names, record)), 0)
    return {layer.name: (layer.kind, layer.block) for layer in facts.layers}


def many(layers: dict[str, LayerRecord]) -> Manifest:
    stored, dense = (sum(getattr(layer, n) for layer in layers.values()) for n in ("bytes", "dense_bytes"))
    return Manifest(
        base_model="large", base_fingerprint="", base_stored_as="BF16", lrsd_version="0", environment={},
        text="", recipe={"samples": 8, "seqlen": 32}, ratio=4.0, checkpoint_ratio=4.0, linear_bytes=stored,
        dense_linear_bytes=dense, budget_bytes=stored, bits_per_weight=4.0, macs_per_token=1,
        dense_macs_per_token=1, allocation={}, allocation_chosen="kl", expected_kl=0.1, propagated=False,
        layers=layers,
    )  # fmt: skip


@pytest.mark.parametrize(("blocks", "experts"), [(48, 256), (3120, 0)])
def test_a_model_of_12480_layers_stays_a_page(blocks: int, experts: int, generator: torch.Generator) -> None:
    entry = {"terms": [{"form": "low_rank", "rank": 8}], "columns": 4}
    nbytes = int(parse_layer("", entry).nbytes(Shape(64, 64)))
    kinds = [*(f"self_attn.{n}_proj" for n in "qkvo"), *(f"mlp.experts.{n}.up_proj" for n in range(experts))]
    layers = {}
    for block in range(blocks):
        for kind, (error, weight) in zip(
            kinds, torch.rand(len(kinds), 2, generator=generator).tolist(), strict=True
        ):
            layers[f"model.layers.{block}.{kind}"] = LayerRecord(
                64, 64, entry, {}, nbytes, 8192, error, error, weight, 0.0, "best of 5", history=(1.0, error),
                routed_tokens=1,
            )  # fmt: skip
    manifest = many(layers)
    assert len(layers) == 12_480
    text = page(manifest, facts_of(manifest, manifest.linear_bytes))
    Structure(text)
    assert len(text) < 2_000_000
    assert text.count("model.<wbr>layers") == 200
    assert "all 12,480 layers" in text
