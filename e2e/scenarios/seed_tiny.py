"""Runs in the trainer image: makes the scenarios' tiny base models and data, and pushes them as artifacts.

    python seed_tiny.py oci://registry/e2e

`<root>/base:tiny` a randomly initialised Qwen2 of about 0.13 M parameters with its tokenizer,
`<root>/encoder:tiny` a randomly initialised BERT,
`<root>/data:tiny` the files train.jsonl (messages), prompts.jsonl (messages without the answer) and heldout.jsonl.
The task: name colour and shape.
"""

import json
import random
import sys
import tempfile
from itertools import product
from pathlib import Path

from slmops_artifacts import Manifest, push

COLOURS = ["red", "green", "blue", "black", "white", "yellow", "pink", "brown"]
SHAPES = ["box", "ball", "cone", "ring", "plate", "stick"]
SIZES = ["tiny", "small", "large", "huge"]
FORMS = [
    "I want a {size} {colour} {shape}",
    "send me the {colour} {shape}, {size}",
    "{colour} {shape} please, {size} one",
]

Example = dict[str, list[dict[str, str]]]


def example(form: str, colour: str, shape: str, size: str, *, answer: bool = True) -> Example:
    """One line of a messages dataset."""
    turns = [{"role": "user", "content": form.format(colour=colour, shape=shape, size=size)}]
    if answer:
        turns.append({"role": "assistant", "content": json.dumps({"colour": colour, "shape": shape})})
    return {"messages": turns}


def splits() -> dict[str, list[Example]]:
    """Train, prompts and held-out sets that share no sentence, always the same."""
    combinations = list(product(FORMS, COLOURS, SHAPES, SIZES))
    random.Random(7).shuffle(combinations)
    return {
        "heldout": [example(*c) for c in combinations[:64]],
        "train": [example(*c) for c in combinations[64:]],
        "prompts": [example(*c, answer=False) for c in combinations[64:]],
    }


CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_base(folder: Path, texts: list[str]) -> None:
    """A Qwen2 with random weights, and a 512-token BPE with a chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)

    torch.manual_seed(7)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=end,
        bos_token_id=None,
        pad_token_id=tokenizer.convert_tokens_to_ids("<|pad|>"),
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = config.pad_token_id
    model.save_pretrained(folder, safe_serialization=True)


def make_encoder(folder: Path, base: Path) -> None:
    """A BERT with random weights and the tokenizer of `base`: no causal language model."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=512, **shape)).save_pretrained(folder, safe_serialization=True)


def main(root: str) -> None:
    sets = splits()
    texts = [turn["content"] for row in sets["train"] for turn in row["messages"]]
    with tempfile.TemporaryDirectory() as scratch:
        base, data, encoder = Path(scratch, "base"), Path(scratch, "data"), Path(scratch, "encoder")
        for folder in (base, data, encoder):
            folder.mkdir()
        make_base(base, texts)
        make_encoder(encoder, base)
        for name, rows in sets.items():
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
            Path(data, f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(push(base, f"{root}/base:tiny", Manifest(kind="model", format="safetensors"))[0])
        print(push(encoder, f"{root}/encoder:tiny", Manifest(kind="model", format="safetensors"))[0])
        print(push(data, f"{root}/data:tiny", Manifest(kind="dataset", format="jsonl"))[0])


if __name__ == "__main__":
    main(sys.argv[1])
