"""Model families whose positions and windows differ compute the same numbers in ONNX: a wrong one shows in no shape."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CHATML, chat, task, write_tokenizer
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)  # fmt: skip

from slmops_trainer import quantize
from slmops_trainer.context import Context

SHAPE: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "tie_word_embeddings": True,
    "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
WINDOW = 8  # tokens, fewer than the examples have
LLAMA_3_SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip


def llama() -> Any:
    """As Llama 3.1: scaled frequencies, another base."""
    return LlamaForCausalLM(LlamaConfig(**SHAPE, rope_theta=500000.0, rope_scaling=LLAMA_3_SCALING))


def phi() -> Any:
    """As Phi-4-mini: a part of each head is rotated, projections are fused."""
    shape = {**SHAPE, "hidden_size": 128}
    config = Phi3Config(**shape, original_max_position_embeddings=256, partial_rotary_factor=0.5, sliding_window=None)
    return Phi3ForCausalLM(config)


def gemma() -> Any:
    """As Gemma: the embedding is scaled where it is looked up, and its config.json does not say that it is tied."""
    shape = {name: value for name, value in SHAPE.items() if name != "tie_word_embeddings"}
    return GemmaForCausalLM(GemmaConfig(**shape, head_dim=16))


def gemma2() -> Any:
    """As Gemma 2: what is attended to is capped, which torch's own attention leaves out, and the logits are.

    Untied: Olive does not find the head behind that cap, and stores a tied embedding twice.
    """
    shape = {**SHAPE, "tie_word_embeddings": False}
    config = Gemma2Config(
        **shape, head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=0.5, sliding_window=WINDOW
    )
    return Gemma2ForCausalLM(config)


def gemma3() -> Any:
    """As Gemma 3: every sixth layer sees all, and has rotary tables of its own."""
    shape = {**SHAPE, "num_hidden_layers": 6}
    config = Gemma3TextConfig(**shape, head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW)
    return Gemma3ForCausalLM(config)


def qwen2(before: int = 1) -> Any:
    """The later layers slide: the builder knows one window for all."""
    window = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": before}
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, **window))


def qwen2_that_never_slides() -> Any:
    """Though its config.json has a window."""
    return qwen2(before=2)


@pytest.mark.slow
@pytest.mark.parametrize("family", [llama, phi, gemma, gemma2, gemma3, qwen2, qwen2_that_never_slides])
def test_a_converted_model_computes_what_its_source_computes(
    make_run: Callable[..., Context], jsonl: Callable[..., str], tmp_path: Path, family: Callable[[], Any]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_tokenizer(folder, CHATML)
    torch.manual_seed(0)
    family().save_pretrained(folder)
    gold = jsonl([chat(*row) for row in task()[:8]], "gold")
    spec = {
        "source": {"uri": "pvc://models/tiny"},
        "precision": "fp32",
        "gate": {"dataset": {"uri": gold}, "metric": "perplexity", "maxDrop": 1e-4},
    }
    result = quantize.run(make_run(model=folder, quantize=spec))
    assert abs(result.metrics["drop"]) < 1e-4
    assert result.metrics["size_ratio"] < 1.1
