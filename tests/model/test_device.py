"""Where a model runs, and where its moments and solvers do: only where there is float64."""

import pytest
import torch

from lrsd.errors import InputError
from lrsd.model.load import exact_device, resolve_device


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> torch.device:
    """torch's accelerator; one without float64 refuses tensors of it, as mps does."""
    device, create = torch.device(request.param), torch.ones

    def ones(*sizes: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if device.type == "mps" and dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return create(*sizes, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: device)
    return device


# meta stands for an accelerator with float64: it is the only other device that every machine has.
@pytest.mark.parametrize(
    ("accelerator", "chosen"), [("mps", "cpu"), ("meta", "meta")], indirect=["accelerator"]
)
def test_auto_is_an_accelerator_only_if_it_has_float64(accelerator: torch.device, chosen: str) -> None:
    assert resolve_device("auto") == torch.device(chosen)
    assert exact_device(accelerator) == torch.device(chosen)


def test_without_an_accelerator_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert resolve_device("auto") == exact_device(torch.device("cpu")) == torch.device("cpu")


def test_a_device_that_is_asked_for_is_not_replaced() -> None:
    assert resolve_device("meta") == torch.device("meta")
    with pytest.raises(InputError, match="'nowhere' is not available"):
        resolve_device("nowhere")
