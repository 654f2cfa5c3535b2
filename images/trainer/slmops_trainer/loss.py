"""Batches and their loss."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slmops_trainer.encoding import IGNORED, Encoded


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded rows, each tensor [rows, longest]. `trained` counts the tokens of the loss."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    trained: int


def collate(rows: Sequence[Encoded], pad_id: int, device: Any) -> Batch:
    """Put rows side by side, as wide as the longest."""
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([[*row.input_ids, *[pad_id] * (width - len(row.input_ids))] for row in rows])
    labels = torch.tensor([[*row.labels, *[IGNORED] * (width - len(row.labels))] for row in rows])
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows])
    trained = sum(row.trained for row in rows)
    return Batch(ids.to(device), mask.to(device), labels.to(device), trained)


def loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    """Sum of the negative log likelihoods of the batch's trained tokens, in nats, fp32.

    Logits are made only where some row has a label: with a large vocabulary they are most of the memory.
    """
    targets = batch.labels[:, 1:]
    columns = (targets != IGNORED).any(dim=0).nonzero().squeeze(1)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if keeps_some_logits(model):
        logits = model(**inputs, logits_to_keep=columns).logits
    else:
        logits = model(**inputs).logits[:, columns]
    loss: torch.Tensor = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets[:, columns].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss


def keeps_some_logits(model: Any) -> bool:
    """Tell whether the model's head can be asked for some positions only."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
