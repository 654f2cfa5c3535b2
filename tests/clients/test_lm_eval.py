"""lm-evaluation-harness over `local-completions` gives what the model itself gives."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from server_harness import TINY, Server
from tokenizers import Tokenizer

TASK = """\
task: ours
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
QUESTIONS = [
    {"question": "The printer on floor three", "choices": ["has failed again", "is green"], "answer": 0},
    {"question": "Answer with strict JSON:", "choices": ["{}", "yes", "no", "Привет, мир!"], "answer": 0},
    {"question": "Grüße aus", "choices": ["Köln", "room 204 before Friday, and ask again " * 4], "answer": 1},
    {"question": "a " * 150 + "a", "choices": ["b", "the team network"], "answer": 1},
]


class Model:
    """The graph itself, one whole sequence at a time."""

    def __init__(self) -> None:
        self._session = ort.InferenceSession(str(TINY / "model.onnx"), providers=["CPUExecutionProvider"])
        self.tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))

    def logprobs(self, ids: list[int]) -> NDArray[np.float64]:
        """Of every token of the vocabulary after each of the sequence: [tokens, vocab]."""
        feed: dict[str, NDArray[np.generic]] = {}
        for put in self._session.get_inputs():
            if put.name.startswith("past_key_values"):
                feed[put.name] = np.zeros((1, put.shape[1], 0, put.shape[3]), np.float32)
        feed |= {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        logits = np.asarray(self._session.run(["logits"], feed)[0], np.float64)[0]
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def score(self, context: str, continuation: str) -> tuple[float, bool]:
        """How likely the continuation is, and whether it is what greedy decoding would say."""
        ids, before = (self.tokenizer.encode(text).ids for text in (context + continuation, context))
        table, at = self.logprobs(ids), np.arange(len(before), len(ids))
        told = table[at - 1, np.array(ids)[at]]
        return float(told.sum()), bool(np.all(told == table[at - 1].max(-1)))


def test_loglikelihoods_are_those_of_the_model(server: Server, programs: Path, tmp_path: Path) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "ours.yaml").write_text(TASK % data)
    # the tiny model calls its tokenizer a Qwen2 one, whose class cuts digits differently from the file itself
    (tmp_path / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    how = {
        "model": "tiny",
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": tmp_path,
        "tokenizer_backend": "huggingface",
        "num_concurrent": 4,
        "max_length": 512,
    }
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    command = [
        str(programs / "lm_eval"),
        *("--model", "local-completions", "--model_args", ",".join(f"{name}={value}" for name, value in how.items())),
        *("--include_path", str(tmp_path), "--tasks", "ours", "--output_path", str(tmp_path / "out"), "--log_samples"),
    ]
    ran = subprocess.run(
        command,
        env={**os.environ, **offline, "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    [samples] = (tmp_path / "out").rglob("samples_*.jsonl")
    [results] = (tmp_path / "out").rglob("results_*.json")
    model, right = Model(), 0
    told = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(told) == len(QUESTIONS)
    for sample in told:
        asked = [(a["arg_0"], a["arg_1"]) for a in sample["arguments"].values()]
        direct = [model.score(*pair) for pair in asked]
        got = [(float(value), greedy == "True") for value, greedy in sample["filtered_resps"]]
        assert [g[0] for g in got] == pytest.approx([d[0] for d in direct], abs=1e-3)
        assert [g[1] for g in got] == [d[1] for d in direct]
        right += int(np.argmax([d[0] for d in direct]) == int(sample["target"]))
    assert json.loads(results.read_text())["results"]["ours"]["acc,none"] == right / len(QUESTIONS)
