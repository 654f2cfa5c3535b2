"""Token ids and labels: golden masks, what inference sees, what ends an answer."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import CHATML, EMPTY_THOUGHTS, MARKED, write_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from slmops_artifacts import Parent
from slmops_trainer import chat_text, encoding, evaluate, synthetic
from slmops_trainer.data import Example, Examples, Message
from slmops_trainer.encoding import IGNORED
from slmops_trainer.failure import RunFailure

# Shows earlier answers without their end: the text of a shorter conversation is no prefix of a longer one's.
FORGETFUL = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{% if loop.last or message['role'] != 'assistant' %}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# Phi-3's way: the text ends, too, after the last turn.
CLOSED = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
# Renders questions only.
SILENT = CHATML.replace(
    "message['content'] + '<|im_end|>", "('' if message['role'] == 'assistant' else message['content']) + '<|im_end|>"
)
# Qwen3's own, without tools: thoughts are shown, empty or not, behind the last question alone.
QWEN3 = (
    "{%- set ns = namespace(last=messages|length - 1, looking=true) %}{%- for message in messages[::-1] %}"
    "{%- set index = (messages|length - 1) - loop.index0 %}{%- if ns.looking and message.role == 'user' %}"
    "{%- set ns.looking = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}{%- set content = message.content %}{%- set reasoning_content = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{%- if loop.index0 > ns.last %}"
    "{%- if loop.last or (not loop.last and reasoning_content) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' }}"
    "{{- content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
# The same as it is patched for trainers that want every answer marked.
QWEN3_MARKED = QWEN3.replace(
    "{%- if loop.index0 > ns.last %}", "{%- generation %}{%- if loop.index0 > ns.last %}"
).replace("{{- '<|im_end|>\n' }}{%- else %}", "{{- '<|im_end|>\n' }}{%- endgeneration %}{%- else %}")
# Has the model think before it answers, and shows no thoughts of earlier answers.
THINKING = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
# The same of Qwen3's models that always think.
OPENED_THOUGHTS = EMPTY_THOUGHTS.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
ENDLESS = CHATML.replace("<|im_end|>", "")
# Marks the answers alone, and ends them in the next line.
APART = MARKED.replace("{{ '<|im_end|>\n' }}", "{{ '\n<|im_end|>\n' }}")
# Marks the answers, of a model that begins its own with a thought.
THOUGHT = MARKED.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
# Marks the last answer alone.
HALF = MARKED.replace("message['role'] == 'assistant' %}", "message['role'] == 'assistant' and loop.last %}")
# SmolLM3's way: what asking writes stands within the marks, and with /no_think empty thoughts, too.
WRAPPED = (
    "{% set begin = '<|im_start|>assistant\n' + ('<think>\n\n</think>\n' if '/no_think' in messages[0]['content'] "
    "else '') %}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ begin + message['content'].lstrip('\n') + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ begin }}{% endif %}"
)
STERN = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML

TALK = Example(
    (Message("system", "be brief"), Message("user", "lamp?"), Message("assistant", "lab"), Message("user", "door?")),
    "hall",
    4,
)
ASK = Example((Message("user", "the lamp"),), '{"room": "lab"}', 1)
END = 2  # <|im_end|>


@pytest.fixture
def tokenizer(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    return write_tokenizer(tmp_path, request.param)


def trained(tokenizer: Any, example: Example, loss_on: chat_text.LossOn = "assistant") -> tuple[str, str]:
    """The whole text, and the text of what is trained, with a bar between separate stretches."""
    (only,) = several(tokenizer, example, loss_on)
    return only


def several(tokenizer: Any, example: Example, loss_on: chat_text.LossOn = "assistant") -> list[tuple[str, str]]:
    """The same of each text that the example becomes."""
    return [_texts(tokenizer, item) for item in encoding.encode(tokenizer, [example], [END], loss_on, 10_000).items]


def _texts(tokenizer: Any, item: encoding.Encoded) -> tuple[str, str]:
    parts: list[list[int]] = [[]]
    for token, label in zip(item.input_ids, item.labels, strict=True):
        assert label in (token, IGNORED)
        if label == IGNORED and parts[-1]:
            parts.append([])
        elif label != IGNORED:
            parts[-1].append(label)
    return tokenizer.decode(item.input_ids), "|".join(tokenizer.decode(part) for part in parts if part)


@pytest.mark.parametrize(
    ("tokenizer", "answer", "cause"),
    [(SILENT, "lab", "chat template leaves the assistant's content out"), (None, "\u200b", "tokenizer leaves it out")],
    indirect=["tokenizer"],
    ids=["template", "tokenizer"],
)
def test_answers_without_a_token_are_named(tokenizer: Any, answer: str, cause: str) -> None:
    if answer != "lab":
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    rows = [Example((Message("user", "the lamp"),), answer, line) for line in (3, 5)]
    with pytest.raises(RunFailure) as caught:
        encoding.encode(tokenizer, rows, [END], "assistant", 100, "pvc://data/set, file rows.jsonl")
    assert caught.value.reason == "NothingToTrain"
    assert f"of pvc://data/set, file rows.jsonl has a token to train on; the first is that of line 3, {answer!r}" in (
        caught.value.message
    )
    assert cause in caught.value.message
    assert len(encoding.encode(tokenizer, rows, [END], "all", 100).items) == 2


@pytest.mark.parametrize("tokenizer", [CHATML, MARKED, WRAPPED], indirect=True, ids=["prefixes", "marks", "wide-marks"])
def test_every_answer_of_a_conversation_is_trained_with_its_end(tokenizer: Any) -> None:
    whole, answers = trained(tokenizer, TALK)
    assert whole == (
        "<|im_start|>system\nbe brief<|im_end|>\n"
        "<|im_start|>user\nlamp?<|im_end|>\n<|im_start|>assistant\nlab<|im_end|>\n"
        "<|im_start|>user\ndoor?<|im_end|>\n<|im_start|>assistant\nhall<|im_end|>\n"
    )
    assert answers == "lab<|im_end|>|hall<|im_end|>"


@pytest.mark.parametrize("tokenizer", [WRAPPED], indirect=True)
def test_what_asking_writes_is_not_learned_though_a_template_marks_it(tokenizer: Any) -> None:
    talk = Example((Message("system", "/no_think"), *TALK.messages[1:]), "hall", 4)
    whole, answers = trained(tokenizer, talk)
    assert whole.count("<think>\n\n</think>\n") == 2
    assert answers == "lab<|im_end|>|hall<|im_end|>"


@pytest.mark.parametrize(
    "tokenizer", [CHATML, MARKED, HALF, WRAPPED, CLOSED, QWEN3, QWEN3_MARKED, ENDLESS], indirect=True
)
@pytest.mark.parametrize(("first", "last", "learned"), [(0, 1, "hall"), (1, 0, "lab")])
def test_answers_of_weight_0_are_shown_and_not_learned(tokenizer: Any, first: int, last: int, learned: str) -> None:
    chat_text.complete(tokenizer, [TALK])
    messages = (*TALK.messages[:2], Message("assistant", "lab", first), TALK.messages[3])
    talk = Example(messages, "hall", 4, last)
    whole, answers = trained(tokenizer, talk)
    assert answers.partition("<|im_end|>")[0] == learned
    assert "|" not in answers.replace("<|im_end|>", "")
    assert "lab" in whole
    # Every token is every token.
    assert trained(tokenizer, talk, "all") == trained(tokenizer, TALK, "all")


@pytest.mark.parametrize("tokenizer", [None, CHATML], indirect=True)
def test_a_row_of_weight_0_is_not_learned_with_or_without_a_template(tokenizer: Any) -> None:
    spoilt = Example(ASK.messages, "lab", 2, 0)
    found = encoding.encode(tokenizer, [ASK, spoilt], [END], "assistant", 1000).items
    assert [item.trained > 0 for item in found] == [True, False]
    assert "lab" in tokenizer.decode(found[1].input_ids)
    assert trained(tokenizer, spoilt, "all")[1] == trained(tokenizer, spoilt, "all")[0]
    with pytest.raises(RunFailure, match=r"that of line 2, 'lab'. It has weight 0") as caught:
        encoding.encode(tokenizer, [spoilt], [END], "assistant", 1000)
    assert caught.value.reason == "NothingToTrain"


@pytest.mark.parametrize("tokenizer", [CHATML, MARKED, WRAPPED, CLOSED, QWEN3, ENDLESS], indirect=True)
def test_a_conversation_of_weight_0_teaches_nothing(tokenizer: Any) -> None:
    messages = (*TALK.messages[:2], Message("assistant", "lab", 0), TALK.messages[3])
    talk = Example(messages, "hall", 4, 0)
    chat_text.complete(tokenizer, [TALK])
    found = encoding.encode(tokenizer, [ASK, talk], [END], "assistant", 1000)
    assert [item.trained > 0 for item in found.items] == [True, False]
    with pytest.raises(RunFailure, match=r"that of line 4, 'hall'. It has weight 0, as have all") as caught:
        encoding.encode(tokenizer, [talk], [END], "assistant", 1000)
    assert caught.value.reason == "NothingToTrain"


@pytest.mark.parametrize("tokenizer", [CLOSED], indirect=True)
def test_a_template_that_ends_the_text_after_the_last_turn_hides_no_earlier_answer(tokenizer: Any) -> None:
    whole, answers = trained(tokenizer, TALK)
    assert whole == tokenizer.apply_chat_template(TALK.turns, tokenize=False)
    assert answers == "lab<|im_end|>|hall<|im_end|>\n<|im_end|>"


@pytest.mark.parametrize("tokenizer", [CHATML], indirect=True)
def test_golden_ids_and_labels(tokenizer: Any) -> None:
    (item,) = encoding.encode(tokenizer, [ASK], [END], "assistant", 64).items
    prompt = encoding.encode_prompt(tokenizer, ASK)
    assert list(item.input_ids[: len(prompt)]) == prompt
    assert list(item.labels[: len(prompt)]) == [IGNORED] * len(prompt)
    answer = tokenizer('{"room": "lab"}', add_special_tokens=False)["input_ids"]
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert list(item.input_ids[len(prompt) :]) == [*answer, END, *newline]
    assert list(item.labels[len(prompt) :]) == [*answer, END, IGNORED]
    assert item.trained == len(answer) + 1


@pytest.mark.parametrize("tokenizer", [CHATML], indirect=True)
def test_all_means_every_token(tokenizer: Any) -> None:
    whole, answers = trained(tokenizer, TALK, "all")
    assert answers == whole


@pytest.mark.parametrize("tokenizer", [CHATML], indirect=True)
@pytest.mark.parametrize("answer", ["\nhall", " hall", "hall\n\n", "h", "<|im_end|>", "größe 😀"])
def test_what_stands_before_an_answer_is_what_inference_gives(tokenizer: Any, answer: str) -> None:
    example = Example((Message("user", "door?\n"),), answer, 1)
    (item,) = encoding.encode(tokenizer, [example], [END], "assistant", 64).items
    prompt = encoding.encode_prompt(tokenizer, example)
    assert list(item.input_ids[: len(prompt)]) == prompt
    assert item.labels[len(prompt)] != IGNORED


@pytest.mark.parametrize(("space", "first"), [(" ", "▁"), ("\n", "")], ids=["mistral", "tinyllama"])
def test_an_answer_gets_no_second_space_where_the_tokenizer_puts_one_before_each_text(space: str, first: str) -> None:
    known = ["<unk>", "</s>", "▁", "▁▁", *"xyz]\n", "▁y", "▁z", "▁x"]
    merges = [("▁", "▁"), ("▁", "y"), ("▁", "z"), ("▁", "x")]
    backend = Tokenizer(models.BPE({token: at for at, token in enumerate(known)}, merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ SPACE + message['content'] + '</s>' }}"
        "{% else %}{{ message['content'] + ' ]' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and SPACE != ' ' %}{{ SPACE }}{% endif %}"
    ).replace("SPACE", repr(space))
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=template)
    end = tokenizer.eos_token_id
    talk = Example((Message("user", "x"), Message("assistant", "y"), Message("user", "x")), "z", 1)
    for shown in (talk, Example((talk.messages[0], Message("assistant", "y", 0), talk.messages[2]), "z", 1)):
        (item,) = encoding.encode(tokenizer, [shown], [end], "assistant", 100).items
        # All of it is what the server makes of the text.
        text = tokenizer.apply_chat_template(talk.turns, tokenize=False)
        assert list(item.input_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
        learned = [label for label in item.labels if label != IGNORED]
        last = tokenizer.convert_tokens_to_ids([f"{first}z", "</s>"])
        assert learned[-2:] == last
        assert encoding.decode_answer(tokenizer, last) == "z"


@pytest.mark.parametrize("tokenizer", [ENDLESS], indirect=True)
def test_an_answer_without_an_end_gets_one(tokenizer: Any) -> None:
    """Directly behind it: where white space of the template stands between, generation would have to say that first."""
    whole, answers = trained(tokenizer, ASK)
    assert whole.endswith('{"room": "lab"}<|im_end|>')
    assert answers == '{"room": "lab"}<|im_end|>'
    assert several(tokenizer, TALK) == [
        (
            "<|im_start|>system\nbe brief\n<|im_start|>user\nlamp?\n<|im_start|>assistant\nlab<|im_end|>",
            "lab<|im_end|>",
        ),
        (tokenizer.decode(encoding.encode_prompt(tokenizer, TALK)) + "hall<|im_end|>", "hall<|im_end|>"),
    ]


@pytest.mark.parametrize("tokenizer", [APART], indirect=True)
def test_an_end_that_a_template_sets_apart_is_not_waited_for(tokenizer: Any) -> None:
    assert trained(tokenizer, TALK)[1] == "lab<|im_end|>|hall<|im_end|>"


@pytest.mark.parametrize("tokenizer", [None], indirect=True)
def test_without_a_template_prompt_and_completion_are_joined(tokenizer: Any) -> None:
    assert trained(tokenizer, ASK) == ('the lamp{"room": "lab"}<|im_end|>', '{"room": "lab"}<|im_end|>')
    assert tokenizer.decode(encoding.encode_prompt(tokenizer, ASK)) == "the lamp"
    with pytest.raises(RunFailure, match="Line 4 is a conversation and the model has no chat template") as caught:
        trained(tokenizer, TALK)
    assert caught.value.reason == "UnsupportedModel"


@pytest.mark.parametrize(
    ("tokenizer", "ended"),
    [(FORGETFUL, ""), (QWEN3, "\n"), (QWEN3_MARKED, "\n")],
    indirect=["tokenizer"],
    ids=["forgetful", "qwen3", "marked"],
)
def test_a_template_that_rewrites_the_past_is_trained_answer_by_answer(tokenizer: Any, ended: str) -> None:
    """Each behind what the server gives the model when that answer is asked for."""
    chat_text.complete(tokenizer, [TALK])
    assert trained(tokenizer, ASK)[1] == '{"room": "lab"}<|im_end|>'
    first = Example(TALK.messages[:2], "lab", TALK.line)
    found = several(tokenizer, TALK)
    assert [answers for _, answers in found] == ["lab<|im_end|>", "hall<|im_end|>"]
    for (whole, answers), example in zip(found, (first, TALK), strict=True):
        assert whole == tokenizer.decode(encoding.encode_prompt(tokenizer, example)) + answers
    # Where every token is trained, none of them twice.
    whole, answers = trained(tokenizer, TALK, "all")
    assert whole == answers == found[1][0]
    assert whole + ended == tokenizer.apply_chat_template(TALK.turns, tokenize=False)


@pytest.mark.parametrize("tokenizer", [QWEN3, QWEN3_MARKED], indirect=True)
def test_thoughts_of_an_earlier_answer_are_to_be_learned_too(tokenizer: Any) -> None:
    thought = "<think>\nbulb\n</think>\n\nlab"
    talk = Example((*TALK.messages[:2], Message("assistant", thought), TALK.messages[3]), "hall", 4)
    chat_text.complete(tokenizer, [talk])
    assert [answers for _, answers in several(tokenizer, talk)] == [
        f"{thought}<|im_end|>",
        "<think>\n\n</think>\n\nhall<|im_end|>",
    ]


@pytest.mark.parametrize("tokenizer", [QWEN3], indirect=True)
def test_a_conversation_is_as_long_as_its_longest_answer_makes_it(tokenizer: Any) -> None:
    """Which is not the last one, where the template shows no earlier thoughts."""
    thought = f"<think>\n{'bulb ' * 200}\n</think>\n\nlab"
    talk = Example((*TALK.messages[:2], Message("assistant", thought), TALK.messages[3]), "hall", 4)
    encoded = encoding.encode(tokenizer, [talk], [END], "assistant", 10_000).items
    assert list(encoding.lengths(tokenizer, [talk, ASK], [END])) == [
        max(len(item.input_ids) for item in encoded),
        len(encoding.encode(tokenizer, [ASK], [END], "assistant", 10_000).items[0].input_ids),
    ]
    assert len(encoded[0].input_ids) > len(encoded[1].input_ids) + 200


@pytest.mark.parametrize("tokenizer", [QWEN3], indirect=True)
@pytest.mark.parametrize("long", [0, 1])
def test_a_prompt_with_an_earlier_answer_that_is_too_long_is_left_out(tokenizer: Any, long: int) -> None:
    """Whichever comes first: it is asked about neither in vain, nor does it fail the others."""
    thoughts = [f"<think>\n{'bulb ' * (400 if at == long else 1)}\n</think>\n\nlab" for at in (0, 1)]
    rows = [Example((*TALK.messages[:2], Message("assistant", one), TALK.messages[3]), None, 4) for one in thoughts]
    prompts = Examples(
        tuple(rows), "messages", "the set", Parent(kind="dataset", uri="pvc://a/b", digest="sha256:" + "1" * 64)
    )
    spec: Any = SimpleNamespace(
        training=SimpleNamespace(max_length=300), data=SimpleNamespace(generation=SimpleNamespace(system_prompt=None))
    )
    loaded: Any = SimpleNamespace(tokenizer=tokenizer, stop_ids=(END,))
    ctx: Any = SimpleNamespace(check=lambda: None)
    assert synthetic.unfit(ctx, loaded, prompts, spec) == {long}


@pytest.mark.parametrize("tokenizer", [QWEN3, QWEN3_MARKED], indirect=True)
def test_thoughts_are_trained_in_every_answer_of_a_conversation(tokenizer: Any) -> None:
    deep = [f"<think>\n{thought}\n</think>\n\n{answer}" for thought, answer in (("bulb", "lab"), ("wood", "hall"))]
    talk = Example((*TALK.messages[:2], Message("assistant", deep[0]), TALK.messages[3]), deep[1], 4)
    chat_text.complete(tokenizer, [talk])
    found = several(tokenizer, talk)
    assert [answers for _, answers in found] == [f"{answer}<|im_end|>" for answer in deep]
    assert "bulb" not in found[1][0]  # nor does the server show it to the model then


@pytest.mark.parametrize("tokenizer", [QWEN3], indirect=True)
def test_a_conversation_that_is_too_long_is_left_out_whole(tokenizer: Any) -> None:
    chat_text.complete(tokenizer, [TALK])
    short, long = (len(item.input_ids) for item in encoding.encode(tokenizer, [TALK], [END], "assistant", 1000).items)
    found = encoding.encode(tokenizer, [TALK, ASK, TALK], [END], "assistant", long - 1)
    assert (len(found.items), found.too_long) == (1, 2)
    assert short < long
    with pytest.raises(RunFailure, match=f"the shortest has {long}"):
        encoding.encode(tokenizer, [TALK, TALK], [END], "assistant", long - 1)


@pytest.mark.parametrize("tokenizer", [CHATML, None], indirect=True)
def test_a_token_that_the_model_lacks_is_named_with_its_line(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<image>"])
    encoding.bound(tokenizer, len(tokenizer) - 1)
    asked, said = Example((Message("user", "an <image>"),), "x", 7), Example((Message("user", "an"),), "<image>", 8)
    encoding.encode(tokenizer, [ASK], [END], "assistant", 100)
    for example in (asked, said):
        with pytest.raises(
            RunFailure, match=f"Line {example.line} holds <image>: .* the model has no weights"
        ) as caught:
            encoding.encode(tokenizer, [ASK, example], [END], "assistant", 100)
        assert caught.value.reason == "BadDataset"
    with pytest.raises(RunFailure, match="Line 7 holds <image>"):
        encoding.encode_prompt(tokenizer, asked)


@pytest.mark.parametrize("tokenizer", [CHATML], indirect=True)
def test_texts_with_a_token_that_the_model_lacks_are_found(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<image>"])
    texts = ["lab", "an <image>", "<imag", "", "<image>"]
    seen: list[None] = []
    for rows, lacking in ((len(tokenizer) - 1, {1, 4}), (len(tokenizer), set())):
        encoding.bound(tokenizer, rows)
        assert encoding.lacking(tokenizer, texts, lambda: seen.append(None)) == lacking
    assert len(seen) == len(texts)


@pytest.mark.parametrize("tokenizer", [THINKING, THOUGHT], indirect=True, ids=["plain", "marks"])
def test_a_template_that_opens_thoughts_is_refused_with_the_cause(tokenizer: Any) -> None:
    """One question and answer a line would not help: the difference is in what is asked."""
    with pytest.raises(RunFailure, match=r"puts '<think>\\n' before an answer that is asked for.*turn 2 of line 1\)"):
        trained(tokenizer, ASK)
    assert encoding.turn_end(tokenizer) == END  # what is not trained, but measured or converted, is not refused


@pytest.mark.parametrize("tokenizer", [EMPTY_THOUGHTS, f"{EMPTY_THOUGHTS}\n"], indirect=True, ids=["plain", "line-end"])
def test_thoughts_that_a_template_leaves_empty_belong_to_the_question(tokenizer: Any) -> None:
    """Else people would be shown them before every answer, and no answer would be equal to the wanted one."""
    assert trained(tokenizer, ASK)[1] == '<think>\n\n</think>\n\n{"room": "lab"}<|im_end|>'
    whole = trained(tokenizer, ASK)[0]
    chat_text.complete(tokenizer, [ASK])
    assert trained(tokenizer, ASK) == (whole, '{"room": "lab"}<|im_end|>')
    (item,) = encoding.encode(tokenizer, [ASK], [END], "assistant", 64).items
    prompt = encoding.encode_prompt(tokenizer, ASK)
    assert list(item.input_ids[: len(prompt)]) == prompt
    answer = encoding.decode_answer(tokenizer, [label for label in item.labels if label != IGNORED])
    assert evaluate.evaluate([answer], ['{"room": "lab"}'], ["exactMatch", "jsonValid"]) == {
        "exactMatch": 1,
        "jsonValid": 1,
    }
    # Once is enough, and who asks for thoughts or none in so many words gets what the template gave before.
    completed = tokenizer.chat_template
    chat_text.complete(tokenizer, [ASK])
    assert tokenizer.chat_template == completed
    turns = [{"role": "user", "content": "x"}]
    for thinking in (True, False):
        texts = [
            tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
            )
            for template in (EMPTY_THOUGHTS, completed)
        ]
        assert texts[0] == texts[1]
        assert texts[0].count("<think>") == (not thinking)


@pytest.mark.parametrize("tokenizer", [OPENED_THOUGHTS], indirect=True)
def test_thoughts_that_a_question_opens_and_an_answer_leaves_empty_are_closed_by_the_question(tokenizer: Any) -> None:
    chat_text.complete(tokenizer, [ASK])
    assert trained(tokenizer, ASK)[1] == '{"room": "lab"}<|im_end|>'
    asked = tokenizer.decode(encoding.encode_prompt(tokenizer, ASK))
    assert asked.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("tokenizer", [EMPTY_THOUGHTS], indirect=True)
def test_thoughts_that_the_answers_bring_are_trained(tokenizer: Any) -> None:
    deep = Example((Message("user", "the lamp"),), "<think>\nhm\n</think>\n\nlab", 2)
    chat_text.complete(tokenizer, [ASK, deep])
    assert tokenizer.chat_template == EMPTY_THOUGHTS
    assert trained(tokenizer, deep)[1] == "<think>\nhm\n</think>\n\nlab<|im_end|>"
    chat_text.complete(tokenizer, [ASK])  # a first tuning, whose result is then tuned on answers with thoughts
    assert tokenizer.chat_template != EMPTY_THOUGHTS
    chat_text.complete(tokenizer, [deep])
    assert tokenizer.chat_template == EMPTY_THOUGHTS


@pytest.mark.parametrize(
    "tokenizer", [CHATML, MARKED, WRAPPED, SILENT, THINKING, FORGETFUL, ENDLESS, None], indirect=True
)
def test_a_template_that_begins_all_answers_alike_is_left_as_it_is(tokenizer: Any) -> None:
    before = tokenizer.chat_template
    chat_text.complete(tokenizer, [ASK])
    assert tokenizer.chat_template == before


@pytest.mark.parametrize("tokenizer", [STERN], indirect=True)
def test_what_a_template_refuses_is_said_with_the_line(tokenizer: Any) -> None:
    with pytest.raises(RunFailure, match="refuses the conversation of line 4: System role not supported"):
        trained(tokenizer, TALK)


@pytest.mark.parametrize("tokenizer", [CHATML], indirect=True)
def test_long_examples_are_left_out_and_counted(tokenizer: Any) -> None:
    long = Example((Message("user", "the lamp " * 50),), "x", 2)
    found = encoding.encode(tokenizer, [ASK, long, ASK], [END], "assistant", 40)
    assert (len(found.items), found.too_long) == (2, 1)
    tokenizer.model_max_length = 40  # the model's context counts as well
    assert encoding.encode(tokenizer, [ASK, long, ASK], [END], "assistant", 1000).too_long == 1
    with pytest.raises(
        RunFailure, match=r"All 1 examples are longer than 8 tokens, the lesser of .*; the shortest has \d+"
    ):
        encoding.encode(tokenizer, [ASK], [END], "assistant", 8)


@pytest.mark.parametrize("tokenizer", [CHATML], indirect=True)
def test_a_large_set_is_tokenized_in_parts_and_can_be_broken_off(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Example((Message("user", f"lamp {number}"),), f"room {number}", number) for number in range(50)]
    whole = encoding.encode(tokenizer, rows, [END], "assistant", 100)
    calls: list[int] = []
    tokenize = type(tokenizer).__call__

    def recording(self: Any, texts: Any, **more: Any) -> Any:
        calls.append(sum(map(len, texts)))
        return tokenize(self, texts, **more)

    monkeypatch.setattr(type(tokenizer), "__call__", recording)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 1000)
    assert encoding.encode(tokenizer, rows, [END], "assistant", 100) == whole
    assert len(calls) > 3
    assert max(calls) < 1100  # the last example of a part may go beyond it
    calls.clear()
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked == 30:
            raise KeyError

    with pytest.raises(KeyError):
        encoding.encode(tokenizer, rows, [END], "assistant", 100, check=check)
    assert sum(calls) < 30 * 100  # no text of the others was looked at


@pytest.mark.parametrize("tokenizer", [CHATML], indirect=True)
def test_tags_of_tool_calls_are_text_though_the_tokenizer_calls_them_special(tokenizer: Any) -> None:
    """As the server has it; else no answer with a call would be equal to the wanted one."""
    wanted = '<tool_call>{"room": "lab"}</tool_call>'
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    ids = tokenizer(wanted, add_special_tokens=False)["input_ids"]
    assert ids[0] in tokenizer.all_special_ids
    assert encoding.decode_answer(tokenizer, [*ids, END]) == wanted


@pytest.mark.parametrize("tokenizer", [CHATML], indirect=True)
def test_the_end_of_a_turn_is_found(tokenizer: Any) -> None:
    assert encoding.turn_end(tokenizer) == END
    tokenizer.chat_template = MARKED  # which leaves the end outside of its marks
    assert encoding.turn_end(tokenizer) == END
    tokenizer.chat_template = ENDLESS
    assert encoding.turn_end(tokenizer) is None
