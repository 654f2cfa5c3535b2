"""Makes what the demo starts from, inside the trainer image: tokenizer, two untrained models, the data sets.

    python3 -m demo.seed oci://registry:5000/demo        pushes base-teacher:1, base-student:1 and data:1 below it

Everything follows from SEED: another run pushes the same bytes under the same digests.
"""

import json
import sys
import tempfile
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from demo import task

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 7
VOCABULARY = 1024
CONTEXT = 256
# Head sizes are multiples of 16, all else multiples of 32: the int4 blocks fit without padding. Few layers learn in
# fewer steps than many of the same size.
TEACHER = {
    "hidden_size": 448,
    "intermediate_size": 1152,
    "num_hidden_layers": 4,
    "num_attention_heads": 7,
    "num_key_value_heads": 7,
}
STUDENT = {
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
}
EMBEDDING_SPREAD = 0.15
ROPE_BASE = 200.0
WHOLE = "user\nassistant\nsystem\n"  # the template's own words: one token each

PAD, BEGIN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Qwen2's split: every digit is a token of its own. To copy ten digits is soon learnt, a hundred room numbers not.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer(texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """A byte-level BPE of VOCABULARY tokens in Qwen2's form, learnt from the task's own text."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (PAD, BEGIN, END)]
    bpe.train_from_iterator(
        chain(texts, [WHOLE] * 3000),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=special,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHATML,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(shape: dict[str, int], tokenizer: "PreTrainedTokenizerFast", seed: int) -> "LlamaForCausalLM":
    """An untrained model of this shape, fp32.

    Two things differ from transformers' defaults, which are made for wide models and long texts; with those, such a
    model does not begin to read its prompt within 300 steps. Layers start out silent (what they write into the
    residual stream is 0) and embeddings well above 0.02, so that at first only the words are heard. Rotary
    positions turn faster (ROPE_BASE), so that neighbours can be told apart from the start: copying needs it.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    pad, begin, end = tokenizer.convert_tokens_to_ids([PAD, BEGIN, END])
    model = LlamaForCausalLM(
        LlamaConfig(
            **shape,
            vocab_size=VOCABULARY,
            max_position_embeddings=CONTEXT,
            rope_theta=ROPE_BASE,
            tie_word_embeddings=True,
            torch_dtype="float32",
            bos_token_id=begin,
            eos_token_id=end,
            pad_token_id=pad,
        )
    )
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            silent = name.endswith(("o_proj.weight", "down_proj.weight"))
            spread = EMBEDDING_SPREAD if "embed" in name else 0.0 if silent else weight.shape[1] ** -0.5
            torch.nn.init.normal_(weight, std=spread)
    model.generation_config = GenerationConfig(bos_token_id=begin, eos_token_id=[end], pad_token_id=pad)
    return model


def write_lines(path: Path, rows: Iterable[object]) -> None:
    """JSONL, one object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_data(folder: Path, sets: task.Sets) -> None:
    """One file a set; every one but prompts.jsonl holds chat turns with the right answer last."""
    for name in ("train", "gate", "known", "new", "tune", "security_known", "security_new"):
        examples: list[task.Example] = getattr(sets, name)
        write_lines(folder / f"{name.replace('_', '-')}.jsonl", (example.messages() for example in examples))
    write_lines(folder / "prompts.jsonl", ({"prompt": text} for text in sets.prompts))
    write_lines(folder / "heldout.jsonl", (example.messages() for example in sets.known + sets.new))


def write_model(folder: Path, shape: dict[str, int], tokenizer: "PreTrainedTokenizerFast", seed: int) -> int:
    """Save a base model as transformers does; returns its number of parameters."""
    model = make_model(shape, tokenizer, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())


def main(argv: list[str]) -> int:
    """Make all of it and push it."""
    from slmops_artifacts import ArtifactError, Manifest, push

    if len(argv) != 1 or not argv[0].startswith("oci://"):
        print("usage: python3 -m demo.seed oci://REGISTRY/REPOSITORY", file=sys.stderr)
        return 3
    sets = task.make_sets(SEED)
    tokenizer = make_tokenizer(text for example in sets.train for text in (example.text, example.answer))
    with tempfile.TemporaryDirectory() as scratch:
        for name, shape in (("base-teacher", TEACHER), ("base-student", STUDENT), ("data", None)):
            folder = Path(scratch) / name
            folder.mkdir()
            if shape:
                count = write_model(folder, shape, tokenizer, SEED)
                manifest = Manifest(kind="model", format="safetensors", seed=SEED, recipe={"untrained": True, **shape})
                what = f"{count:,} parameters, untrained"
            else:
                write_data(folder, sets)
                manifest = Manifest(kind="dataset", format="jsonl", seed=SEED, recipe={"generator": "demo.task"})
                what = f"{len(sets.train)} training examples, {len(sets.prompts)} prompts"
            try:
                uri, _ = push(folder, f"{argv[0]}/{name}:1", manifest)
            except ArtifactError as error:
                print(f"Cannot push {name}: {error}", file=sys.stderr)
                return 1
            print(f"Pushed {uri} ({what})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
