"""Tool calls in the text of an answer, whatever pieces it comes in."""

import json
import re
from pathlib import Path

import orjson
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from slmops_server import tools
from slmops_server.detok import CLOSE, OPEN, DetokenizerFactory
from slmops_server.errors import ApiError
from slmops_server.grammar import Grammar, calls_grammar, read_grammar
from slmops_server.guide import Guides
from slmops_server.messages import Tools, read_tools
from slmops_server.tools import ToolParser

CALL = '{"name": "f", "arguments": {"a": "ü"}}'
PLAIN = '{"name": "f", "arguments": {"a": 1}}'
NESTED = '{"name": "f", "arguments": {"a": "<tool_call>"}}'
LONE = r'{"name": "f", "arguments": {"ü": "\ud83d", "\udc00": 1}}'  # JSON can spell half a character, UTF-8 cannot
CASES = [
    (True, "no call < here", "no call < here", []),
    (True, f"<tool_call>\n{CALL}\n</tool_call>", "", [{"a": "ü"}]),
    (True, f"text<tool_call>{CALL}</tool_call>\n<tool_call>\n{CALL}\n</tool_call>\n", "text", [{"a": "ü"}, {"a": "ü"}]),
    (True, f"<tool_call>\n{CALL}", "", [{"a": "ü"}]),
    (True, "<tool_call>nonsense</tool_call>!", "<tool_call>nonsense</tool_call>!", []),
    (True, '<tool_call>{"name": "g"}', '<tool_call>{"name": "g"}', []),
    (True, "a <tool_", "a <tool_", []),
    (True, '<tool_call>{"name": ["f"]}</tool_call>', '<tool_call>{"name": ["f"]}</tool_call>', []),
    (False, '{"name": {"first": "Ann"}}', '{"name": {"first": "Ann"}}', []),
    (False, '[{"name": []}, 3]', '[{"name": []}, 3]', []),
    (
        True,
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}',
        [],
    ),
    (True, f"<tool_call>{LONE}</tool_call>", "", [{"ü": "\ud83d", "\udc00": 1}]),
    (False, LONE, "", [{"ü": "\ud83d", "\udc00": 1}]),
    (False, f" {CALL}", "", [{"a": "ü"}]),
    (False, f"[{CALL}, {CALL}]", "", [{"a": "ü"}, {"a": "ü"}]),
    (False, '{"name": "f", "parameters": {}}', "", [{}]),
    (False, '{"json": true}', '{"json": true}', []),
    (False, f"Sure: {CALL}", f"Sure: {CALL}", []),
    (False, "[]", "[]", []),
    (False, "", "", []),
    # tags that the text only speaks of, or that were opened twice
    (True, f"use <tool_call> tags\n<tool_call>\n{CALL}\n</tool_call>", "use <tool_call> tags\n", [{"a": "ü"}]),
    (True, f"use <tool_call> tags\n<tool_call>\n{CALL}\n", "use <tool_call> tags\n", [{"a": "ü"}]),
    (True, f'<tool_call>{{"na<tool_call>{CALL}</tool_call>', '<tool_call>{"na', [{"a": "ü"}]),
    (True, f'<tool_call>{{"na<tool_call>{CALL}', '<tool_call>{"na', [{"a": "ü"}]),
    (True, f"<tool_call>{NESTED}</tool_call>", "", [{"a": "<tool_call>"}]),
    (True, "a <tool_call>", "a <tool_call>", []),
]
HELD = '{"name": "f", "arguments": {"a": "close with \\"</tool_call>\\" or </tool_call>", "</tool_call>": 1}}'
ARGUMENTS = {"a": 'close with "</tool_call>" or </tool_call>', "</tool_call>": 1}
CUT = '{"name": "f", "arguments": {"a": "x'
CASES += [
    # tags in what a call says
    (True, f"a<tool_call>{HELD}</tool_call>", "a", [ARGUMENTS]),
    (True, f"<tool_call>{HELD}", "", [ARGUMENTS]),
    (True, f"<tool_call>{HELD}</tool_call><tool_call>{CALL}</tool_call>", "", [ARGUMENTS, {"a": "ü"}]),
    (True, f"<tool_call>{CUT}</tool_call> and more", f"<tool_call>{CUT}</tool_call> and more", []),
    (
        True,
        f"<tool_call>{CUT}</tool_call>\n<tool_call>{CALL}</tool_call>",
        f"<tool_call>{CUT}</tool_call>\n",
        [{"a": "ü"}],
    ),
]
ONE = [
    # where one call is allowed
    (
        True,
        f"<tool_call>{CALL}</tool_call><tool_call>{CUT}</tool_call><tool_call>{CALL}</tool_call>.",
        f"<tool_call>{CUT}</tool_call>.",
        1,
    ),
    (True, f"a<tool_call>{CALL}</tool_call>\n<tool_call>\n{CALL}\n</tool_call>\n", "a", 1),
    (True, f"<tool_call>nonsense</tool_call><tool_call>{CALL}", "<tool_call>nonsense</tool_call>", 1),
    (True, f"<tool_call>[{CALL}, {CALL}]</tool_call>", "", 1),
    (True, f"<tool_call>{CALL}</tool_call><tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", 1),
    (False, f"[{CALL}, {CALL}]", "", 1),
    (False, CALL, "", 1),
]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(("tagged", "answer", "shown", "arguments"), CASES, ids=[c[1][:30] for c in CASES])
def test_calls_and_text(tagged: bool, answer: str, shown: str, arguments: list[object], size: int) -> None:
    parser = ToolParser(tagged, {"f"})
    got = [parser.feed(answer[at : at + size]) for at in range(0, len(answer), size)] + [parser.end()]
    assert "".join(text for text, _ in got) == shown
    calls = [call for _, some in got for call in some]
    assert [json.loads(orjson.loads(orjson.dumps(call.arguments))) for call in calls] == arguments
    assert parser.called == len(calls) == len({call.id for call in calls})
    assert {call.name for call in calls} <= {"f"}


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("byte_level", [False, True])
def test_calls_are_found_though_the_tokenizer_calls_their_tags_special(byte_level: bool, special: bool) -> None:
    """As some models' tokenizers do; of the others its special tokens stay out of the text."""
    vocab = {name: at for at, name in enumerate(["[UNK]", "I", "call", "again", *PLAIN.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.ByteLevel() if byte_level else decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens([AddedToken(tag, special=special, normalized=False) for tag in (OPEN, CLOSE)])
    stream, parser = DetokenizerFactory(tokenizer).new(), ToolParser(tagged=True, names={"f"})
    ids = tokenizer.encode(f"I call {OPEN} {PLAIN} {CLOSE} again <|end|>").ids
    got = [parser.feed(stream.feed(token)) for token in ids] + [parser.end()]
    assert [json.loads(call.arguments) for _, calls in got for call in calls] == [{"a": 1}]
    assert "".join(text for text, _ in got).replace(" ", "") == "Icallagain"


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(("tagged", "answer", "shown", "count"), ONE, ids=[c[1][:30] for c in ONE])
def test_calls_beyond_those_allowed_are_left_out(tagged: bool, answer: str, shown: str, count: int, size: int) -> None:
    parser = ToolParser(tagged, {"f"}, most=1)
    got = [parser.feed(answer[at : at + size]) for at in range(0, len(answer), size)] + [parser.end()]
    assert "".join(text for text, _ in got) == shown
    assert parser.called == len([call for _, some in got for call in some]) == count


def test_ids_of_calls_have_the_form_that_mistrals_templates_want() -> None:
    parser = ToolParser(tagged=True, names={"f"})
    _, calls = parser.feed(f"<tool_call>{CALL}</tool_call>" * 50)
    assert len({call.id for call in calls}) == 50
    for call in calls:
        assert re.fullmatch("[a-zA-Z0-9]{9}", call.id)


def test_a_model_that_repeats_its_close_tag_is_not_read_from_the_start_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[int] = []
    loads, sub = json.loads, re.sub
    monkeypatch.setattr(tools.json, "loads", lambda text: (read.append(len(text)), loads(text))[1])
    monkeypatch.setattr(tools.re, "sub", lambda *how, **more: (read.append(len(how[2])), sub(*how, **more))[1])
    parser, answer = ToolParser(tagged=True, names={"f"}), OPEN + CUT + CLOSE * 1000
    assert [parser.feed(tag) for tag in re.findall("<[^<]*", answer)] == [("", [])] * 1001
    assert parser.end() == (answer, [])
    assert 0 < sum(read) < 2 * len(answer)


def test_text_goes_on_behind_a_tag_that_it_only_speaks_of() -> None:
    parser = ToolParser(tagged=True, names={"f"})
    fed = ("use <tool_call>", " tags", " then")
    assert [parser.feed(text)[0] for text in fed] == ["use ", "<tool_call> tags", " then"]


def strict_and_loose(**more: object) -> Tools:
    """Of the functions f, which is strict, and g."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    f = {"name": "f", "strict": True, "parameters": {**schema, "additionalProperties": False}}
    g = {"name": "g", "parameters": {"type": "object", "not": {"required": ["c"]}}}
    tools = read_tools({"tools": [{"type": "function", "function": one} for one in (f, g)], **more})
    assert tools
    return tools


def may_be(file: Path, grammar: Grammar, answer: str) -> bool:
    """Whether a model with that tokenizer may write the answer and end there."""
    tokenizer = Tokenizer.from_file(str(file))
    guide = Guides(file, tokenizer.get_vocab_size(), [2]).new(grammar.kind, grammar.text)
    for token in tokenizer.encode(answer, add_special_tokens=False).ids:
        if not guide.allowed()[token]:
            return False
        guide.take(token)
    return bool(guide.allowed()[2])


TEXT = "Let me see, < 3: <tool_cal>ü"
GOOD = '\n{"name": "f", "arguments": {"a": 1}}\n'
WRONG = '\n{"name": "f", "arguments": {"a": "1"}}\n'
LOOSE = '\n{"name": "g", "arguments": {"b": [2]}}\n'


BARE, WRONG_BARE, LOOSE_BARE = GOOD.strip(), WRONG.strip(), LOOSE.strip()


@pytest.mark.parametrize(
    ("answer", "fits"),
    [
        ("", True),
        (" \n", True),
        (f"{TEXT}{WRONG}", True),
        (f" \r\n{BARE}", True),
        (LOOSE_BARE, True),
        (f"[{BARE}, {LOOSE_BARE}]", True),
        (WRONG_BARE, False),
        (f"\r{WRONG_BARE}", False),
        (f"[{BARE}, {WRONG_BARE}]", False),
        (f"{BARE}{TEXT}", False),
        ('{"a": 1}', False),
        ("[1]", False),
    ],
)
def test_calls_of_strict_tools_keep_to_their_schemas_where_the_template_has_no_tags(
    tiny: Path, answer: str, fits: bool
) -> None:
    assert may_be(tiny / "tokenizer.json", calls_grammar(strict_and_loose(), tagged=False), answer) == fits


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("answer", "fits"),
    [
        ("", True),
        (TEXT, True),
        (f"{TEXT}{OPEN}{GOOD}{CLOSE}", True),
        (f"{OPEN}{GOOD}{CLOSE}\n{OPEN}{LOOSE}{CLOSE}{TEXT}", True),
        (f"{TEXT}{OPEN}{WRONG}{CLOSE}", False),
        (f"{OPEN}{GOOD}{CLOSE}{OPEN}{WRONG}{CLOSE}", False),
        (f"{OPEN}never mind", False),
    ],
)
def test_calls_of_strict_tools_keep_to_their_schemas_where_the_model_may_also_write_text(
    tiny: Path, tmp_path: Path, special: bool, answer: str, fits: bool
) -> None:
    """Whether the model spells a tag out or has a token for it."""
    file = tokenizer_of(tiny, tmp_path, special)
    grammar = calls_grammar(strict_and_loose(), tagged=True, special=(OPEN, CLOSE) if special else ())
    assert may_be(file, grammar, answer) == fits


def tokenizer_of(tiny: Path, folder: Path, special: bool) -> Path:
    """The small model's, which may have tokens for the tags."""
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    if special:
        tokenizer.add_special_tokens([AddedToken(tag, special=True) for tag in (OPEN, CLOSE)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


NODE = {
    "type": "object",
    "properties": {"b": {"type": "string"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["b"],
    "additionalProperties": False,
}
FORM = {"response_format": {"type": "json_object", "schema": {"$ref": "#/$defs/node", "$defs": {"node": NODE}}}}
FORMED = '{"b": "<tool_call>", "next": {"b": "ü"}}'
FIRST, SECOND = f"{OPEN}{GOOD}{CLOSE}", f"\n{OPEN}{LOOSE}{CLOSE}"


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("more", "answer", "fits"),
    [
        ({}, FORMED, True),
        ({}, '{"b": 1}', False),
        ({}, "", False),
        ({}, TEXT, False),
        ({}, FIRST, True),
        ({}, FIRST + SECOND, True),
        ({}, f"{OPEN}{WRONG}{CLOSE}", False),
        ({}, FIRST + FORMED, False),
        ({}, FORMED + FIRST, False),
        ({}, TEXT + FIRST, False),
        ({"parallel_tool_calls": False}, FORMED, True),
        ({"parallel_tool_calls": False}, FIRST, True),
        ({"parallel_tool_calls": False}, FIRST + SECOND, False),
        ({"tool_choice": "required"}, FIRST + SECOND, True),
        ({"tool_choice": "required"}, FORMED, False),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, FIRST, True),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, FORMED, False),
    ],
)
def test_an_answer_is_in_its_format_or_calls(
    tiny: Path, tmp_path: Path, special: bool, more: dict[str, object], answer: str, fits: bool
) -> None:
    form = read_grammar(FORM)
    tags = (OPEN, CLOSE) if special else ()
    grammar = calls_grammar(strict_and_loose(**more), tagged=True, special=tags, form=form)
    if special and answer == FORMED:  # its tokenizer would write the tag as one token, which no string has
        answer = answer.replace(OPEN, "<tool_cal>")
    assert may_be(tokenizer_of(tiny, tmp_path, special), grammar, answer) == fits


def test_calls_without_tags_go_past_a_format_only_where_they_are_forced(tiny: Path) -> None:
    form, forced = read_grammar(FORM), strict_and_loose(tool_choice="required")
    assert may_be(tiny / "tokenizer.json", calls_grammar(forced, tagged=False, form=form), BARE)
    with pytest.raises(ApiError) as caught:
        calls_grammar(strict_and_loose(), tagged=False, form=form)
    assert (caught.value.status, caught.value.param) == (400, "response_format")


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    "answer", [FORMED, '{"<tool_call>{": {}, "b": [{"name": "f"}]}', '["<tool_call>[", {"name": "f"}, "</tool_call>"]']
)
def test_an_answer_in_its_format_may_speak_of_tags(answer: str, size: int) -> None:
    parser = ToolParser(tagged=True, names={"f"})
    got = [parser.feed(answer[at : at + size]) for at in range(0, len(answer), size)] + [parser.end()]
    assert ("".join(text for text, _ in got), parser.called) == (answer, 0)
