"""Detokenisation and stop strings, as tables and against the tokenizers library."""

import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from slmops_server.detok import DetokenizerFactory, StopScanner


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny / "tokenizer.json"))


def pieces(tokenizer: Tokenizer, ids: list[int], after: list[int] | None = None) -> list[str]:
    stream = DetokenizerFactory(tokenizer).new(after or ())
    return [stream.feed(i) for i in ids]


@pytest.mark.parametrize(
    "text", ["Hello, wörld", "Привет, мир!", "你好 🤗🚀 a🤗b", "  two  spaces\n\ttabs ", "e\u0301 \u200d"]
)
def test_text_comes_back_in_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    got = pieces(tokenizer, tokenizer.encode(text).ids)
    assert "".join(got) == text
    assert not any("\ufffd" in piece for piece in got)


def test_a_character_cut_by_the_end_is_not_sent(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.token_to_id(c) for c in ("a", "ð", "Ł", "¤")]  # a and three of the four bytes of an emoji
    assert pieces(tokenizer, ids) == ["a", "", "", ""]


def test_special_tokens_are_silent(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.token_to_id("a"), tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("b")]
    assert pieces(tokenizer, ids) == ["a", "", "b"]


def test_unknown_ids_are_silent(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, [100000, -1]) == ["", ""]


def test_random_tokens_decode_as_the_library_does(tokenizer: Tokenizer) -> None:
    draw = random.Random(1)
    for _ in range(300):
        ids = [draw.randrange(3, tokenizer.get_vocab_size()) for _ in range(draw.randrange(1, 30))]
        ours, whole = "".join(pieces(tokenizer, ids)), tokenizer.decode(ids)
        assert whole.startswith(ours)
        assert set(whole[len(ours) :]) <= {"\ufffd"}  # the cut end, which the library shows as broken


def test_a_sentencepiece_style_vocabulary_with_byte_fallback() -> None:
    vocab = {"<unk>": 0, "<0xF0>": 1, "<0x9F>": 2, "<0xA4>": 3, "<0x97>": 4, "\u2581the": 5, "\u2581end": 6}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    assert pieces(tokenizer, [5, 1, 2, 3, 4, 6]) == ["the", "", "", "", "🤗", " end"]
    assert pieces(tokenizer, [5, 6], after=[6]) == [" the", " end"]


def test_added_tokens_of_white_space_are_written_as_the_library_does() -> None:
    """Gemma has such: SentencePiece's user-defined pieces become added tokens."""
    blanks = ["\u2581\u2581", "\u2581\u2581\u2581\u2581"]
    names = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "\u2581", *blanks, "\n", "d", "e", "\u2581f", ":"]
    tokenizer = Tokenizer(models.BPE({name: at for at, name in enumerate(names)}, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in [*blanks, "\n"]])
    assert pieces(tokenizer, [tokenizer.token_to_id(name) for name in ["d", ":", "\n", *blanks]])[3:] == ["  ", "    "]
    draw = random.Random(3)
    for _ in range(300):
        ids = [draw.choice([66, *range(257, len(names))]) for _ in range(draw.randrange(1, 30))]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_any_other_decoder_goes_through_the_library() -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "now": 3}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert "".join(pieces(tokenizer, [1, 2, 3])) == "playing now"
    assert "".join(pieces(tokenizer, [2, 3], after=[3] * 20 + [1])) == "ing now"
    assert "".join(pieces(tokenizer, [1, 2], after=[3])) == " playing"


STOPS = [
    # stops, pieces fed, what is sent for each, whether it stopped
    (["END"], ["some", " text"], ["some", " text"], False),
    (["END"], ["abEND", "more"], ["ab"], True),
    (["END"], ["ab E", "N", "D after"], ["ab ", "", ""], True),
    (["END"], ["E", "N", "X"], ["", "", "ENX"], False),
    (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""], True),
    (["ab", "b"], ["xa", "b"], ["x", ""], True),
    (["\n\n"], ["one\n", "two\n", "\n"], ["one", "\ntwo", ""], True),
    (["long stop", "st"], ["a long ", "st"], ["a ", "long "], True),
    ([], ["anything"], ["anything"], False),
    (["é"], ["caf", "é"], ["caf", ""], True),
]


@pytest.mark.parametrize(("stops", "fed", "sent", "stopped"), STOPS)
def test_stop_strings_across_pieces(stops: list[str], fed: list[str], sent: list[str], stopped: bool) -> None:
    scanner = StopScanner(stops)
    got = []
    for piece in fed:
        text, done = scanner.feed(piece)
        got.append(text)
        if done:
            break
    assert (got, done) == (sent, stopped)
    assert stopped or "".join(got) + scanner.flush() == "".join(fed)


EARLY = [
    # stops, pieces fed without looking, then those with; what is sent of all, whether it stopped
    (["END"], ["aEND"], ["b", " END"], "aENDb ", True),
    (["END"], ["aEN"], ["D"], "a", True),  # it ends where it counts
    (["END"], ["aEN", "D"], ["."], "aEND.", False),
    (["abc", "b"], ["ab"], ["x"], "abx", False),  # held for the sake of the longer one
    (["abc", "b"], ["ab"], ["c"], "", True),
    (["b"], ["b"], [], "b", False),
]


@pytest.mark.parametrize(("stops", "early", "later", "sent", "stopped"), EARLY)
def test_stop_strings_count_where_they_end(
    stops: list[str], early: list[str], later: list[str], sent: str, stopped: bool
) -> None:
    scanner, got, done = StopScanner(stops), "", False
    for piece, looking in [*((piece, False) for piece in early), *((piece, True) for piece in later)]:
        assert not done
        text, done = scanner.feed(piece, looking)
        got += text
    assert (got + scanner.flush(), done) == (sent, stopped)


def test_stop_strings_cut_at_the_same_place_however_the_text_is_split() -> None:
    draw = random.Random(2)
    for _ in range(2000):
        text = "".join(draw.choice("aab ") for _ in range(24))
        stops = ["".join(draw.choice("ab ") for _ in range(draw.randrange(1, 4))) for _ in range(draw.randrange(1, 4))]
        cuts = sorted(draw.sample(range(len(text)), 6))
        scanner, out, done = StopScanner(stops), "", False
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            piece, done = scanner.feed(text[start:end])
            out += piece
            if done:
                break
        out += scanner.flush()
        # a stop met earlier in the stream wins, as a reader of the stream would see it
        first_end = min((text.find(s) + len(s) for s in stops if s in text), default=None)
        assert done == (first_end is not None)
        assert out == text if not done else text.startswith(out) and not any(s in out for s in stops)
