"""The programs that bench_peers.py compares: what their environments hold, and the settings they run with.

Each setting names the bits per weight of the group that it was chosen for; the table sorts by what is
measured. All that a setting does not say is the tool's default.
"""

import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What llm-compressor's newest release admits, for all that do.
_TRANSFORMERS = "transformers==5.17.0"
_LLAMA_CPP = "llama-cpp-python==0.3.36"


@dataclass(frozen=True)
class Setting:
    """One row of the table. bits: of the group it belongs to; options: what the driver gets."""

    name: str
    bits: float
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Tool:
    """A program. driver: in this folder; requirements: of its environment, none for the one that runs this.

    torch: pinned, and installed before the others: an unpinned one downloads gigabytes of CUDA. isolated:
    False for a package that can be built only where torch is. prepare: makes what else is needed in the
    environment's folder, and returns options for the driver.
    """

    driver: str
    settings: tuple[Setting, ...]
    requirements: tuple[str, ...] = ()
    torch: str = "torch==2.13.0"
    isolated: bool = True
    prepare: Callable[[Path], Mapping[str, Any]] = field(default=lambda venv: {})


def environment(tool: Tool, venv: Path) -> tuple[str, Mapping[str, Any]]:
    """The python of its environment, made if it is not there yet, and options for the driver.

    Raises: subprocess.CalledProcessError, whose stderr says what could not be installed.
    """
    if not tool.requirements:
        return sys.executable, {}
    python = venv / "bin" / "python"
    done = venv / "installed"
    if not done.exists():
        call(sys.executable, "-m", "venv", venv)
        pip = (python, "-m", "pip", "install", "--quiet")
        call(*pip, tool.torch)
        call(*pip, "--upgrade", "setuptools", "wheel", "numpy")
        call(*pip, *(() if tool.isolated else ("--no-build-isolation",)), tool.torch, *tool.requirements)
        done.write_text("\n".join(tool.requirements))
    return str(python), tool.prepare(venv)


def build_llama_cpp(venv: Path) -> Mapping[str, Any]:
    """The source archive of llama-cpp-python holds the whole of llama.cpp; some ten minutes on two cores."""
    python, source, build = venv / "bin" / "python", venv / "source", venv / "build"
    if not (build / "done").exists():
        source.mkdir(exist_ok=True)
        download = (python, "-m", "pip", "download", "--quiet", "--no-deps", "-d", source)
        call(*download, "--no-binary", "llama-cpp-python", _LLAMA_CPP)
        with tarfile.open(next(source.glob("*.tar.gz"))) as archive:
            archive.extractall(source, filter="data")
        tree = next(source.glob("*/vendor/llama.cpp"))
        cmake = venv / "bin" / "cmake"
        make = f"-DCMAKE_MAKE_PROGRAM={venv / 'bin' / 'ninja'}"
        off = [f"-DLLAMA_{part}=OFF" for part in ("CURL", "BUILD_SERVER", "BUILD_TESTS", "BUILD_EXAMPLES")]
        call(cmake, "-G", "Ninja", make, "-S", tree, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *off)
        call(cmake, "--build", build, "--target", "llama-quantize", "llama-imatrix")
        (build / "done").touch()
    return {"bin": str(build / "bin"), "source": str(next(source.glob("*/vendor/llama.cpp")))}


def call(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)


def _gptq(bits: float, **weights: Any) -> Setting:
    asymmetric = "" if weights["symmetric"] else ", asymmetric"
    return Setting(f"GPTQ W{weights['num_bits']} g{weights['group_size']}{asymmetric}", bits, weights)


def _auto_round(recipe: str, **more: Any) -> tuple[Setting, ...]:
    return tuple(
        Setting(f"{recipe}W{bits} g{group}", level, {"bits": bits, "group_size": group, "sym": True, **more})
        for bits, group, level in ((4, 128, 4.25), (4, 64, 4.25), (3, 64, 3), (2, 64, 2))
    )


TOOLS: Mapping[str, Tool] = {
    "lrsd": Tool(
        "run_lrsd.py",
        tuple(Setting(f"{bits:g} bits", bits, {"ratio": 16 / bits}) for bits in (9, 8, 4.25, 4, 3, 2)),
    ),
    "llm-compressor": Tool(
        "run_llm_compressor.py",
        (
            Setting("GPTQ W4A16", 4.25, {"scheme": "W4A16"}),
            _gptq(4.25, num_bits=4, group_size=64, symmetric=True),
            _gptq(4.25, num_bits=4, group_size=64, symmetric=False),
            Setting("GPTQ W8A16", 8, {"scheme": "W8A16"}),
            Setting("SparseGPT 2:4, which it stores dense", 9, {"sparsity": 0.5, "mask_structure": "2:4"}),
        ),
        ("llmcompressor==0.14.0.1",),
    ),
    "llama.cpp": Tool(
        "run_llama_cpp.py",
        tuple(
            Setting(f"{name}, imatrix", bits, {"type": name})
            for name, bits in (
                ("Q8_0", 8),
                ("Q4_K_M", 4.25),
                ("Q4_0", 4.25),
                ("IQ4_NL", 4.25),
                ("IQ4_XS", 4.25),
                ("Q3_K_M", 3),
                ("IQ3_S", 3),
                ("Q2_K", 2),
                ("IQ2_XS", 2),
                ("Q2_0", 2),
            )
        ),
        (_TRANSFORMERS, "gguf==0.19.0", "sentencepiece", "protobuf", "accelerate", "cmake", "ninja"),
        prepare=build_llama_cpp,
    ),
    "hqq": Tool(
        "run_hqq.py",
        tuple(
            Setting(f"W{bits} g64", level, {"nbits": bits, "group_size": 64})
            for bits, level in ((8, 8), (4, 4.25), (3, 3), (2, 2))
        ),
        ("hqq==0.2.8.post1", _TRANSFORMERS, "accelerate"),
        isolated=False,
    ),
    "gptqmodel": Tool(
        "run_gptqmodel.py",
        tuple(
            Setting(f"GPTQ W{bits} g{group}", level, {"bits": bits, "group_size": group})
            for bits, group, level in ((4, 128, 4.25), (4, 64, 4.25), (3, 64, 3), (2, 64, 2))
        ),
        ("gptqmodel==7.7.0",),
        "torch==2.14.1",  # no older one will do; where it comes with CUDA, some 5 GB
        isolated=False,
    ),
    "auto-round": Tool("run_auto_round.py", _auto_round(""), ("auto-round==0.16.1", _TRANSFORMERS)),
    # The recipe that its command line calls "light".
    "auto-round-light": Tool(
        "run_auto_round.py",
        _auto_round("light, ", iters=50, lr=5e-3),
        ("auto-round==0.16.1", _TRANSFORMERS),
    ),
}
