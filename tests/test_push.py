"""Uploading a result: only one that is as it was written, without what differs from run to run; a hub that
refuses or does not answer is one line."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.errors import HTTPError as NetworkError

from lrsd.checkpoint.push import push
from lrsd.compress import compress
from lrsd.errors import CheckpointError, InputError, LaterError
from lrsd.recipe import Recipe


@pytest.fixture(scope="module")
def result(tiny_model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("push") / "small"
    recipe = Recipe.of(
        ratio=2, bits="16", allocation="uniform", calib=str(text_file), samples=2, seqlen=16,
        include=["*.0.*q_proj"],
    )  # fmt: skip
    compress(str(tiny_model_dir), output, recipe)
    return output


class Hub:
    """What is asked of a hub. fault: what creating a repository raises."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.created: list[dict[str, Any]] = []
        self.uploaded: list[dict[str, Any]] = []
        self._fault = fault

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        if self._fault is not None:
            raise self._fault
        self.created.append({"repo_id": repo_id, **options})

        class Address(str):
            __slots__ = ("repo_id",)

        address = Address(f"https://hub.example/{repo_id}")
        address.repo_id = repo_id
        return address

    def upload_folder(self, **options: Any) -> None:
        self.uploaded.append(options)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    def make(fault: Exception | None = None) -> Hub:
        made = Hub(fault)
        monkeypatch.setattr("lrsd.checkpoint.push.HfApi", lambda: made)
        return made

    return make


@pytest.mark.parametrize("public", [False, True])
def test_a_result_is_uploaded_whole_but_for_time_and_memory(
    result: Path, hub: Callable[..., Hub], public: bool
) -> None:
    asked = hub()
    assert push(result, "me/small", public=public) == "https://hub.example/me/small"
    assert asked.created == [{"repo_id": "me/small", "private": not public, "exist_ok": True}]
    (upload,) = asked.uploaded
    assert (upload["repo_id"], upload["folder_path"]) == ("me/small", result)
    assert upload["ignore_patterns"] == ["run.json"]


def test_a_changed_file_is_not_uploaded(result: Path, hub: Callable[..., Hub]) -> None:
    asked, recipe = hub(), result / "recipe.json"
    before = recipe.read_text()
    recipe.write_text(before + " ")
    try:
        with pytest.raises(CheckpointError, match=r"recipe\.json changed"):
            push(result, "me/small")
    finally:
        recipe.write_text(before)
    assert not asked.created


def answered(status: int) -> HfHubHTTPError:
    request = SimpleNamespace(url="https://hub.example", method="POST")
    response: Any = SimpleNamespace(status_code=status, headers={}, request=request)
    return HfHubHTTPError(f"{status}\nfrom the hub", response=response)


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        (HFValidationError("no such name"), InputError, "cannot push to 'me/small': no such name"),
        (LocalTokenNotFoundError("no token"), InputError, "no token"),
        (answered(403), InputError, r"'me/small': 403 from the hub; check .*`hf auth login`"),
        (answered(503), LaterError, "503 from the hub; try again later"),
        (OfflineModeIsEnabled("offline"), LaterError, r"does not answer \(offline\); check the network"),
        (NetworkError("reset"), LaterError, r"does not answer \(reset\)"),
    ],
)
def test_a_hub_that_refuses_or_does_not_answer_is_one_line(
    result: Path, hub: Callable[..., Hub], fault: Exception, error: type[Exception], says: str
) -> None:
    asked = hub(fault)
    with pytest.raises(error, match=says) as refused:
        push(result, "me/small")
    assert type(refused.value) is error
    assert "\n" not in str(refused.value)
    assert not asked.uploaded
