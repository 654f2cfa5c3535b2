"""Training on a GPU. Skipped where there is none: the default image, and so `make test`, computes on the CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_train import STEPS, fit, recipe, stop_after

from slmops_trainer.context import Context
from slmops_trainer.failure import RunFailure

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and an image with CUDA's PyTorch")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora-with-dropout"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_a_gpu_goes_on_from_its_checkpoint(
    make_run: Callable[..., Context], tiny_model: Path, lora: bool, precision: str
) -> None:
    """Not bit for bit, as on the CPU: a GPU adds up in an order of its own."""
    training = recipe(precision=precision)
    whole, report = fit(make_run(uid="whole", finetune=None), tiny_model, training, lora)
    assert {weights.device.type for weights in whole.values()} == {"cuda"}
    ctx = make_run(uid="torn", finetune=None)
    stop_after(ctx, STEPS // 2)
    with pytest.raises(RunFailure) as caught:
        fit(ctx, tiny_model, training, lora)
    assert caught.value.reason == "Interrupted"
    torn, resumed = fit(make_run(uid="torn", finetune=None), tiny_model, training, lora)
    assert resumed.resumed_at == STEPS // 2
    assert {weights.device.type for weights in torn.values()} == {"cuda"}
    assert (resumed.steps, resumed.tokens) == (report.steps, report.tokens)
    assert resumed.loss == pytest.approx(report.loss, rel=1e-2 if precision == "bf16" else 1e-4)
