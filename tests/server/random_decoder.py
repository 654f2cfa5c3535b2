"""Small decoders with random weights in Hugging Face's form, written without torch: the sources of GGUF in tests.

data/greedy.json holds what transformers answers with them. Where torch and transformers 4.57 are:

    python tests/server/random_decoder.py tests/server/data/tiny-int4 tests/server/data/greedy.json
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FAMILIES = ("llama", "qwen2", "qwen3")
HEADS, KV_HEADS, HIDDEN, INNER, LAYERS, VOCAB, CONTEXT = 4, 2, 64, 128, 2, 512, 512
SPREAD = 0.2
PROMPTS = ([40, 41, 300, 7], [(37 * index + 11) % 509 + 3 for index in range(70)])
COUNT = 24  # tokens of an answer


def config(family: str) -> dict[str, Any]:
    """As config.json has it."""
    return {
        "model_type": family,
        "architectures": [{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family] + "ForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": 32 if family == "qwen3" else HIDDEN // HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "hidden_act": "silu",
        "tie_word_embeddings": family != "llama",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }


def weights(family: str) -> dict[str, NDArray[np.float32]]:
    """By name. They are float16 numbers, so that a GGUF of that type holds the same."""
    draw, told = np.random.default_rng(7), config(family)
    size = told["head_dim"]
    made: dict[str, NDArray[np.float32]] = {}

    def add(name: str, *shape: int, about: float = 0.0) -> None:
        made[name] = (about + SPREAD * draw.standard_normal(shape)).astype(np.float16).astype(np.float32)

    add("model.embed_tokens.weight", VOCAB, HIDDEN)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            add(f"{at}self_attn.{part}_proj.weight", heads * size, HIDDEN)
            if family == "qwen2":
                add(f"{at}self_attn.{part}_proj.bias", heads * size)
        add(f"{at}self_attn.o_proj.weight", HIDDEN, HEADS * size)
        if family == "qwen3":
            add(f"{at}self_attn.q_norm.weight", size, about=1.0)
            add(f"{at}self_attn.k_norm.weight", size, about=1.0)
        for part, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
            add(f"{at}mlp.{part}_proj.weight", *shape)
        add(f"{at}input_layernorm.weight", HIDDEN, about=1.0)
        add(f"{at}post_attention_layernorm.weight", HIDDEN, about=1.0)
    add("model.norm.weight", HIDDEN, about=1.0)
    if not told["tie_word_embeddings"]:
        add("lm_head.weight", VOCAB, HIDDEN)
    return made


def write(folder: Path, family: str, tokenizer: Path) -> Path:
    """The model's folder, with the tokenizer of another one."""
    folder.mkdir(parents=True, exist_ok=True)
    header, offset, made = {}, 0, weights(family)
    for name, array in made.items():
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    blob = b"".join(array.tobytes() for array in made.values())
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + blob)
    (folder / "config.json").write_text(json.dumps(config(family)))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, folder / name)
    return folder


def greedy(folder: Path) -> list[list[int]]:
    """What transformers answers to each of PROMPTS."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    answers = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(COUNT):
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        answers.append(tokens[len(prompt) :])
    return answers


def main() -> None:
    """Write what transformers answers."""
    tokenizer, out = map(Path, sys.argv[1:3])
    with tempfile.TemporaryDirectory() as temporary:
        found = {family: greedy(write(Path(temporary) / family, family, tokenizer)) for family in FAMILIES}
    out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
