"""Make the tiny multi-adapter models that the server tests serve, two adapters, and what transformers says to them.

Run it in the trainer image (PYTHONPATH: operator, images/artifacts, images/trainer, tests/server):

    python tests/server/make_tiny_adapters.py tests/server/data/tiny-lora

The base is that of data/tiny-int4. `answers.json` has the greedy tokens of transformers and peft in fp32 for prompts
under no adapter ("") and under each.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

ADAPTERS = {  # all modules, and few at another rank
    "all": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "few": {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True},
}
PROMPTS = [[5, 6, 7], [40], list(range(3, 60)), [400, 37, 255, 18] * 20]
TOKENS = 24


def answers(model: torch.nn.Module) -> list[list[int]]:
    """The greedy tokens after each prompt."""
    how = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    out = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        told = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)
        out.append(told[0, len(prompt) :].tolist())
    return out


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out.resolve()
    here = Path(__file__).parent
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        source, peft = Path(temporary) / "source", Path(temporary) / "peft"
        subprocess.run(
            [sys.executable, here / "make_tiny_model.py", Path(temporary) / "plain", "--source", source], check=True
        )
        for precision in ("fp32", "int4"):
            command = ["-m", "slmops_trainer.multi_lora", source, out / precision, "--precision", precision]
            subprocess.run([sys.executable, *command], check=True)
        told = {"": answers(AutoModelForCausalLM.from_pretrained(source))}
        for seed, (name, how) in enumerate(ADAPTERS.items()):
            torch.manual_seed(seed)
            base = AutoModelForCausalLM.from_pretrained(source)
            get_peft_model(base, LoraConfig(init_lora_weights=False, **how)).save_pretrained(peft / name)
            subprocess.run(["olive", "convert-adapters", "-a", peft / name, "-o", out / name / "weights"], check=True)
            told[name] = answers(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), peft / name))
        (out / "answers.json").write_text(json.dumps({"prompts": PROMPTS, "answers": told}))
    print(*(f"{p.relative_to(out)} {p.stat().st_size:,}" for p in sorted(out.rglob("*")) if p.is_file()), sep="\n")


if __name__ == "__main__":
    main()
