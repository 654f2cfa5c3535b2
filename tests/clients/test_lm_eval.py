"""lm-evaluation-harness over `local-completions` gives what the model itself gives."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from server_harness import TINY, Server
from tokenizers import Tokenizer

HEAD = """\
task: %s
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
doc_to_text: "{{question}}"
"""
CHOOSING = """\
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITING = """\
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: %s, max_gen_toks: 40}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
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


def evaluate(server: Server, programs: Path, folder: Path, name: str, task: str) -> tuple[list[Any], dict[str, float]]:
    """What the harness was told for each question, and what it made of it."""
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / f"{name}.yaml").write_text(HEAD % (name, data) + task)
    # the tiny model calls its tokenizer a Qwen2 one, whose class cuts digits differently from the file itself
    (folder / "tokenizer.json").write_bytes((TINY / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    how = {
        "model": "tiny",
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": folder,
        "tokenizer_backend": "huggingface",
        "num_concurrent": 4,
        "max_length": 512,
    }
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    command = [
        str(programs / "lm_eval"),
        *("--model", "local-completions", "--model_args", ",".join(f"{name}={value}" for name, value in how.items())),
        *("--include_path", str(folder), "--tasks", name, "--output_path", str(folder / "out"), "--log_samples"),
    ]
    ran = subprocess.run(
        command,
        env={**os.environ, **offline, "HF_HOME": str(folder / "hf")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    [samples] = (folder / "out").rglob("samples_*.jsonl")
    [results] = (folder / "out").rglob("results_*.json")
    told = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(told) == len(QUESTIONS)
    return told, json.loads(results.read_text())["results"][name]


def test_loglikelihoods_are_those_of_the_model(server: Server, programs: Path, tmp_path: Path) -> None:
    told, results = evaluate(server, programs, tmp_path, "choosing", CHOOSING)
    model, right = Model(), 0
    for sample in told:
        asked = [(a["arg_0"], a["arg_1"]) for a in sample["arguments"].values()]
        direct = [model.score(*pair) for pair in asked]
        got = [(float(value), greedy == "True") for value, greedy in sample["filtered_resps"]]
        assert [g[0] for g in got] == pytest.approx([d[0] for d in direct], abs=1e-3)
        assert [g[1] for g in got] == [d[1] for d in direct]
        right += int(np.argmax([d[0] for d in direct]) == int(sample["target"]))
    assert results["acc,none"] == right / len(QUESTIONS)


def test_answers_end_before_any_of_a_tasks_many_stop_strings(server: Server, programs: Path, tmp_path: Path) -> None:
    texts = [
        server.complete(prompt=question["question"], max_tokens=40).json()["choices"][0]["text"]
        for question in QUESTIONS
    ]
    met = [found[0] for text in texts for found in [re.search("[a-z]{2}", text[5:])] if found]
    until = ["Question:", "Q:", "</s>", "<|im_end|>", *sorted({*met})]
    assert len(until) > 4
    told, _ = evaluate(server, programs, tmp_path, "writing", WRITING % json.dumps(until))
    expected = [re.split("|".join(map(re.escape, until)), text)[0] for text in texts]
    assert expected != texts
    assert [sample["resps"][0][0] for sample in told] == expected
