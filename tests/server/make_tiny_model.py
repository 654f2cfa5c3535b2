r"""Make the tiny random model that the server tests serve (and larger ones for benchmarks).

Run it where torch, transformers 4.57, onnxruntime-genai 0.14.1 and onnx are; the tests themselves need none of
these, they use the checked-in result:

    python tests/server/make_tiny_model.py tests/server/data/tiny-int4 --precision int4
    ... /tmp/teacher --precision fp32 --vocab 1024 --hidden 384 --layers 6 --heads 6 --inter 1024
    ... /tmp/student --precision int4 --vocab 1024 --hidden 128 --layers 4 --inter 384

tests/server/data/tiny-ir is the same model as OpenVINO IR (0.4 GB more in that environment: optimum-intel 1.27.0,
nncf 3.4.0, openvino and openvino-tokenizers 2026.4.1):

    ... --source /tmp/source
    optimum-cli export openvino -m /tmp/source --task text-generation-with-past \
        --weight-format int4 --sym --group-size 32 --ratio 1.0 tests/server/data/tiny-ir

The weights are random but the shapes, the tokenizer, the chat template and the ONNX graph are those of a real Qwen2.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = (
    "The customer writes that the printer on floor three has failed again and asks for help before Friday.",
    "Ticket: severity high, product router, team network, room 204, due 2026-05-17.",
    'Answer with strict JSON: {"product": "printer", "severity": "low", "team": "support"}',
    "Привет, мир! Grüße aus Köln, à bientôt, 你好 🤗🚀",
)


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab` tokens with the ChatML special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special, min_frequency=1
    )
    words = [
        f"{a}{b}" for a in "bcdfghklmnprst" for b in ("an", "er", "in", "on", "at", "es", "or", "ing", "ion", "ent")
    ]
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    more = ["".join(draw.choices(letters, k=draw.randint(3, 9))) for _ in range(vocab if vocab > 4096 else 0)]
    bpe.train_from_iterator([*CORPUS, " ".join(more), " ".join(f"{w}{v}" for w in words for v in words[:12])], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def copy(source: Path, target: Path) -> None:
    """The files of one folder into another, which may belong to somebody else."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        shutil.copy(path, target / path.name)


def main() -> None:
    """Write the model folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", help="the folder for ONNX; none is made without it")
    parser.add_argument("--precision", default="int4", choices=("int4", "fp32"))
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--inter", type=int, default=128)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--block", type=int, default=32, help="block size of int4 weights")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--std", type=float, default=0.2, help="spread of the random weights: higher is livelier")
    parser.add_argument("--source", type=Path, help="where to leave the weights as Hugging Face has them")
    args = parser.parse_args()
    if args.out is None and args.source is None:
        parser.error("name a folder, --source or both")

    torch.manual_seed(args.seed)
    tok = tokenizer(args.vocab)
    config = Qwen2Config(
        vocab_size=len(tok),
        hidden_size=args.hidden,
        intermediate_size=args.inter,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.context,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        initializer_range=args.std,
        torch_dtype="float32",
        bos_token_id=tok.pad_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tok.pad_token_id, eos_token_id=[tok.eos_token_id], pad_token_id=tok.pad_token_id
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source"
        model.save_pretrained(source)
        tok.save_pretrained(source)
        settings = json.loads((source / "tokenizer_config.json").read_text())
        settings["tokenizer_class"] = "Qwen2Tokenizer"
        (source / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
        if args.source:
            copy(source, args.source)
        if args.out is None:
            return
        built = Path(temporary) / "built"
        subprocess.run(
            [
                sys.executable,
                "-m",
                "onnxruntime_genai.models.builder",
                "-m",
                str(source),
                "-i",
                str(source),
                "-o",
                str(built),
                "-p",
                args.precision,
                "-e",
                "cpu",
                "-c",
                str(Path(temporary) / "cache"),
                "--extra_options",
                f"int4_block_size={args.block}",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        copy(built, args.out)
    print(*(f"{p.name} {p.stat().st_size:,}" for p in sorted(args.out.iterdir())), sep="\n")


if __name__ == "__main__":
    main()
