"""Models on disk: what is refused and why, what is mended, what is written; answers in batches."""
# ruff: noqa: E501  # tables: one row a line

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CHATML, task, write_model, write_tokenizer
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, Phi3Config, Phi3ForCausalLM

from slmops.api.run import Input
from slmops_artifacts import Manifest
from slmops_trainer import context as run_context
from slmops_trainer import encoding, generate, main, models
from slmops_trainer.context import Context
from slmops_trainer.data import Example, Message
from slmops_trainer.failure import RunFailure

END = 2  # <|im_end|>


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    """Change keys of a JSON file; None removes."""
    path = folder / name
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def drop(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def drop_eos(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", eos_token=None, tokenizer_class="PreTrainedTokenizerFast")
    drop(folder, "special_tokens_map.json")


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def save_rows(folder: Path, rows: int) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:rows].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


# As transformers 5 writes it for Phi-3.5 and Phi-4-mini.
LONGROPE: dict[str, Any] = {
    "type": "longrope", "rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 4.0, 8.0, 16.0],
    "rope_theta": 5e5, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 64,
}  # fmt: skip

REFUSED: list[tuple[str, Callable[[Path], object], str]] = [
    ("bert", lambda f: edit(f, architectures=["BertForMaskedLM"]), r"the model is a BertForMaskedLM; a causal language model"),
    ("encoder-decoder", lambda f: edit(f, architectures=["T5ForConditionalGeneration"]), r"is a T5ForConditionalGeneration"),
    ("own code", lambda f: edit(f, architectures=["EvilForCausalLM"], auto_map={"AutoModelForCausalLM": "evil.Evil"}), r"is a EvilForCausalLM.*bring their own code are refused"),
    ("no architecture", lambda f: edit(f, architectures=None), r"names no architecture in config.json"),
    ("quantized", lambda f: edit(f, quantization_config={"quant_method": "gptq"}), r"is quantized already \(gptq\)"),
    ("no config", lambda f: (f / "config.json").unlink(), r"has no config.json: it is not a transformers model"),
    ("broken config", lambda f: (f / "config.json").write_text("{"), r"config.json is not JSON"),
    ("list config", lambda f: (f / "config.json").write_text("[]"), r"config.json is not a JSON object"),
    ("no weights", lambda f: (f / "model.safetensors").unlink(), r"has no .safetensors weights"),
    ("no tokenizer", lambda f: drop(f, *models.TOKENIZER_FILES), r"has no tokenizer"),
    ("SentencePiece alone", lambda f: (drop(f, *models.TOKENIZER_FILES), (f / "tokenizer.model").write_bytes(b"x")), r"has a tokenizer.model alone. Publish tokenizer.json with the model"),
    ("fewer rows than words", lambda f: (edit(f, vocab_size=300), save_rows(f, 300)), r"knows \d+ tokens, its model 300: they do not belong together"),
    ("phi3 with a factor of its own", lambda f: edit(f, model_type="phi3", architectures=["Phi3ForCausalLM"], rope_parameters={**LONGROPE, "attention_factor": 1.5}), r"attention_factor of its own"),
    ("adapter", lambda f: (f / "config.json").rename(f / "adapter_config.json"), r"is a LoRA adapter, not a model. Merge it"),
    ("cut weights", lambda f: (f / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{"), r"cannot be loaded by transformers"),
    ("other model's weights", lambda f: edit(f, hidden_size=128), r"cannot be loaded by transformers"),
    ("missing weights", drop_a_weight, r"lacks weights of its architecture, among them model.layers.1.mlp.up_proj.weight"),
    ("no eos", drop_eos, r"has no eos_token"),
    ("rope by layer type", lambda f: edit(f, rope_parameters={"full_attention": {"rope_theta": 1e6}}), r"written by transformers 5"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_cannot_be_trained_is_refused_with_the_reason(
    folder: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(folder)
    with pytest.raises(RunFailure, match=message) as caught:
        models.load(folder, "the model")
    assert caught.value.reason == "UnsupportedModel"


@pytest.fixture
def fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are fetched of oci://r/m:1, which is `folder`."""
    names: list[str] = []
    real = run_context.pull

    def pull(uri: str, dest: Path, **more: Any) -> Manifest:
        if uri != REMOTE:
            return real(uri, dest, **more)
        there, choose = sorted(path.name for path in folder.iterdir()), more["choose"]
        wanted = there if choose is None else choose(there)
        dest.mkdir()
        for name in wanted:
            shutil.copyfile(folder / name, dest / name)
        names.extend(wanted)
        return Manifest(kind="model", digest="sha256:" + "0" * 64)

    monkeypatch.setattr(run_context, "pull", pull)
    return names


REMOTE = "oci://r/m:1"


def remote(ctx: Context) -> Context:
    ctx.spec = ctx.spec.model_copy(update={"model": Input(uri=REMOTE)})
    return ctx


# What is known of a model only when it is there.
INSIDE = ("fewer rows than words", "cut weights", "other model's weights", "missing weights", "no eos")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [row[1:] for row in REFUSED if row[0] not in INSIDE],
    ids=[row[0] for row in REFUSED if row[0] not in INSIDE],
)
def test_a_model_that_its_config_shows_to_be_unfit_costs_no_weights(
    spoil: Callable[[Path], object], message: str, folder: Path, fetched: list[str], make_run: Callable[..., Context]
) -> None:
    spoil(folder)
    with pytest.raises(RunFailure, match=message.replace("the model is", f"{REMOTE} is")) as caught:
        models.fetch(remote(make_run()), "base")
    assert caught.value.reason == "UnsupportedModel"
    assert set(fetched) <= {"config.json"}


def test_a_fit_model_is_fetched_whole_and_one_in_a_volume_is_read_once(
    folder: Path, fetched: list[str], make_run: Callable[..., Context]
) -> None:
    names = sorted(path.name for path in folder.iterdir())
    whole, manifest = models.fetch(remote(make_run()), "base")
    assert fetched == ["config.json", *names]
    assert (sorted(path.name for path in whole.iterdir()), manifest.kind) == (names, "model")
    ctx = make_run()
    models.fetch(ctx, "base")
    assert [path.name for path in ctx.work.iterdir()] == ["base"]


@pytest.mark.parametrize("recipe", ["finetune", "distill", "quantize"])
def test_no_recipe_fetches_the_weights_of_another_kind_of_model(
    recipe: str, folder: Path, fetched: list[str], make_run: Callable[..., Context], jsonl: Callable[..., str]
) -> None:
    rows = {"uri": jsonl([{"prompt": "p", "completion": "c"}])}
    endpoint = {"url": "http://127.0.0.1:9/v1", "model": "m"}
    specs: dict[str, Any] = {
        "finetune": {"base": {"uri": REMOTE}, "dataset": rows},
        "distill": {"teacher": {"endpoint": endpoint}, "student": {"uri": REMOTE}, "data": {"prompts": rows}},
        "quantize": {"source": {"uri": REMOTE}, "precision": "int4"},
    }
    if recipe == "quantize":
        edit(folder, head_dim=7)
    else:
        edit(folder, architectures=["BertForMaskedLM"])
    ctx = remote(make_run(teacher=endpoint, **{recipe: specs[recipe]}))
    with pytest.raises(RunFailure, match="heads of 7 values" if recipe == "quantize" else "BertForMaskedLM"):
        main.recipe(ctx.spec)(ctx)
    assert fetched == ["config.json"]


def test_a_checkpoint_of_transformers_5_keeps_its_rope_base(folder: Path) -> None:
    edit(folder, rope_theta=None, rope_scaling=None, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    edit(folder, "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    assert AutoConfig.from_pretrained(folder).rope_theta == 10000.0  # the silent damage
    assert models.load(folder, "the model").model.config.rope_theta == 5e5


def test_a_prefix_space_that_tokenizer_json_has_needs_no_sentencepiece(folder: Path) -> None:
    before = models.load(folder, "the model").tokenizer("a lamp")["input_ids"]
    edit(
        folder,
        "tokenizer_config.json",
        tokenizer_class="LlamaTokenizerFast",
        add_prefix_space=True,
        add_bos_token=False,
    )
    assert models.load(folder, "the model").tokenizer("a lamp")["input_ids"] == before


def test_rope_scaling_of_transformers_5_is_kept() -> None:
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "partial_rotary_factor": 0.5}
    found = models.modernise({"rope_parameters": scaled, "x": 1}, "m")
    assert found == {
        "x": 1, "rope_theta": 5e5, "partial_rotary_factor": 0.5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}
    }  # fmt: skip


def test_a_phi3_of_transformers_5_computes_what_version_4_computes(folder: Path) -> None:
    config = Phi3Config(
        vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0,
        max_position_embeddings=256, original_max_position_embeddings=64, rope_theta=5e5, partial_rotary_factor=0.5,
        rope_scaling={name: LONGROPE[name] for name in ("type", "short_factor", "long_factor")}, eos_token_id=2,
    )  # fmt: skip
    model = Phi3ForCausalLM(config).eval()
    drop(folder, "model.safetensors")
    model.save_pretrained(folder)
    ids = torch.arange(100).reshape(1, -1)  # beyond the 64 of the short factors
    edit(folder, rope_theta=None, rope_scaling=None, partial_rotary_factor=None, rope_parameters=LONGROPE)
    loaded = models.load(folder, "the model")
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, model(ids).logits)


def test_special_tokens_of_transformers_5_are_special(folder: Path) -> None:
    token = {"content": "<|more|>", "__type": "AddedToken", "special": True}
    edit(folder, "tokenizer_config.json", extra_special_tokens=["<|im_start|>", token])
    found = models.load(folder, "the model").tokenizer
    more = found.convert_tokens_to_ids(["<|im_start|>", "<|more|>"])
    assert set(more) <= set(found.all_special_ids)
    assert encoding.decode_answer(found, [*more, *found("lamp")["input_ids"]]) == "lamp"


def test_a_token_for_images_is_no_reason_to_refuse_a_model_for_text(folder: Path) -> None:
    """Gemma 3 of 270M and 1B: the tokenizer is that of the larger ones, which see."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(folder)
    edit(folder, vocab_size=rows)
    save_rows(folder, rows)
    loaded = models.load(folder, "the model")
    row = Example((Message("user", "an <image>"),), "x", 3)
    with pytest.raises(RunFailure, match="Line 3 holds <image>"):
        encoding.encode_prompt(loaded.tokenizer, row)
    assert len(generate.generate(loaded.model, loaded.tokenizer, examples()[:1], 5, 1)) == 1
    # One that every answer would need is another matter.
    edit(folder, "tokenizer_config.json", chat_template=CHATML.replace("<|im_start|>", "<image>"))
    drop(folder, "chat_template.jinja")
    with pytest.raises(RunFailure, match="they do not belong together"):
        models.load(folder, "the model")


def test_attention_is_capped_as_the_config_says(tmp_path: Path) -> None:
    """As Gemma 2: torch's own attention ignores the cap."""
    write_tokenizer(tmp_path, CHATML)
    config = Gemma2Config(
        vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, max_position_embeddings=256, attn_logit_softcapping=0.5, initializer_range=0.2,
        query_pre_attn_scalar=16, attn_implementation="eager", eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(40).reshape(1, -1)
    with torch.no_grad():
        assert torch.equal(models.load(tmp_path, "the model").model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("form", ["list", "file"])
def test_a_template_for_tools_goes_along(folder: Path, tmp_path: Path, form: str) -> None:
    if form == "list":
        own = json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template")
        named = [{"name": "default", "template": own or CHATML}, {"name": "tool_use", "template": "{{ tools }}"}]
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        edit(folder, "tokenizer_config.json", chat_template=named)
    else:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    loaded = models.load(folder, "m")
    out = tmp_path / "out"
    models.write(loaded, loaded.model, out)
    assert (out / "additional_chat_templates/tool_use.jinja").read_text() == "{{ tools }}"
    assert (out / "chat_template.jinja").read_text() == loaded.tokenizer.chat_template
    again = models.load(out, "m")
    assert again.tokenizer.chat_template == loaded.tokenizer.chat_template


def test_writing_keeps_tokenizer_dtype_and_every_end(tmp_path: Path) -> None:
    source = write_model(tmp_path, CHATML, torch.bfloat16)
    edit(source, "tokenizer_config.json", eos_token="<|endoftext|>")
    (source / "special_tokens_map.json").unlink()
    edit(source, "generation_config.json", eos_token_id=0, temperature=0.3, do_sample=True)
    loaded = models.load(source, "m")
    loaded.tokenizer(["lamp", "the lamp"], padding=True)  # which its tokenizer remembers, and its file does not
    assert loaded.model.dtype == torch.float32
    assert loaded.dtype == torch.bfloat16
    assert loaded.stop_ids == (0, 2)  # the base's declared end of text, and the end that its chat template writes
    out = tmp_path / "out"
    models.write(loaded, loaded.model, out)
    again = models.load(out, "again")
    assert again.stop_ids == (0, 2)
    assert again.dtype == torch.bfloat16
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (out / "chat_template.jinja").read_text() == CHATML
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == CHATML
    assert "temperature" not in json.loads((out / "generation_config.json").read_text())
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in after)


def begin_texts(folder: Path) -> None:
    """As DeepSeek's: the class puts the token before every text, and tokenizer.json does not."""
    edit(
        folder,
        "tokenizer_config.json",
        tokenizer_class="LlamaTokenizerFast",
        add_bos_token=True,
        bos_token="<|endoftext|>",
    )


def add_by_config(folder: Path) -> None:
    """The end is an ordinary word of tokenizer.json, and a token of its own in tokenizer_config.json alone."""
    content = json.loads((folder / "tokenizer.json").read_text())
    edit(
        folder,
        "tokenizer.json",
        added_tokens=[one for one in content["added_tokens"] if one["content"] != "<|im_end|>"],
    )


@pytest.mark.parametrize(
    "change",
    [begin_texts, add_by_config, lambda folder: drop(folder, "tokenizer.json")],
    ids=["begin", "added", "vocab.json"],
)
def test_the_server_gets_the_ids_that_were_trained(
    folder: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    AutoTokenizer.from_pretrained(folder).backend_tokenizer.model.save(str(folder))
    change(folder)
    loaded = models.load(folder, "m")
    out = tmp_path / "out"
    out.mkdir()
    models.copy_tokenizer(loaded, out)
    text = "the lamp<|im_end|>\n"
    wanted = loaded.tokenizer(text)["input_ids"]
    assert END in wanted
    assert Tokenizer.from_file(str(out / "tokenizer.json")).encode(text).ids == wanted
    assert AutoTokenizer.from_pretrained(out)(text)["input_ids"] == wanted


def examples() -> list[Example]:
    texts = ["", "the ", "please, please, note that the "]
    rows = [
        Example((Message("user", texts[at % 3] + question),), answer)
        for at, (question, answer) in enumerate(task()[:12])
    ]
    return [*rows, Example((Message("user", "lamp " * 190),), "x")]


@pytest.mark.parametrize("batch_size", [2, 5, 64])
def test_batches_change_no_answer(tiny_model: Path, batch_size: int) -> None:
    loaded = models.load(tiny_model, "tiny")
    with torch.no_grad():  # a random model repeats one token; this one has more to say
        for parameter in loaded.model.model.layers.parameters():
            parameter.mul_(5)
    seen: list[tuple[int, int]] = []
    alone = generate.generate(loaded.model, loaded.tokenizer, examples(), 20, 1)
    together = generate.generate(
        loaded.model,
        loaded.tokenizer,
        examples(),
        20,
        batch_size,
        on_batch=lambda done, total: seen.append((done, total)),
    )
    assert together == alone
    assert len(set(alone)) > 3
    assert seen[-1] == (13, 13)


def test_answers_are_the_argmax_of_the_model_step_by_step(tiny_model: Path) -> None:
    loaded = models.load(tiny_model, "tiny")
    example = examples()[1]
    ids = encoding.encode_prompt(loaded.tokenizer, example)
    start = len(ids)
    with torch.no_grad():
        for _ in range(10):
            ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in loaded.stop_ids:
                break
    expected = loaded.tokenizer.decode(
        [token for token in ids[start:] if token not in loaded.stop_ids], skip_special_tokens=True
    )
    assert generate.generate(loaded.model, loaded.tokenizer, [example], 10, 4) == [expected]


def test_an_answer_is_measured_to_the_letter(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the server gives it: tokenizers that tidy up the spaces before punctuation change what the model said."""
    loaded = models.load(tiny_model, "tiny")
    loaded.tokenizer.clean_up_tokenization_spaces = True
    texts = ["Ça va ?", "[ 1 , 2 ]", " do n't"]
    rows = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    monkeypatch.setattr(generate, "_greedy", lambda *_: rows)
    asked = [Example((Message("user", "x"),), text) for text in texts]
    assert generate.generate(loaded.model, loaded.tokenizer, asked, 20, 3) == texts


def test_a_prompt_as_long_as_the_context_gets_no_answer(tiny_model: Path) -> None:
    loaded = models.load(tiny_model, "tiny")
    long = Example((Message("user", "lamp " * 300),), "x")
    tight = Example((Message("user", "lamp " * 236),), "x")
    assert 240 < len(encoding.encode_prompt(loaded.tokenizer, tight)) < 256
    answers = generate.generate(loaded.model, loaded.tokenizer, [long, tight, examples()[0]], 30, 8)
    assert answers[0] == ""
    assert answers[2] == generate.generate(loaded.model, loaded.tokenizer, [examples()[0]], 30, 8)[0]


def test_prompts_that_fill_the_context_share_batches_and_keep_their_answers(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """maxTokens as large as the context leaves no prompt the room that is asked for; memory is set by batchSize."""
    loaded = models.load(tiny_model, "tiny")
    with torch.no_grad():  # a random model repeats one token; this one has more to say
        for parameter in loaded.model.model.layers.parameters():
            parameter.mul_(5)
    asked = [Example((Message("user", "lamp " * (200 + at)),), "x") for at in (0, 0, 3, 5, 20, 30)]
    rows: list[int] = []
    greedy = generate._greedy
    monkeypatch.setattr(generate, "_greedy", lambda *given: (rows.append(len(given[1])), greedy(*given))[1])
    alone = generate.generate(loaded.model, loaded.tokenizer, asked, 256, 1)
    room = [256 - len(encoding.encode_prompt(loaded.tokenizer, example)) for example in asked]
    assert (rows, len(set(alone))) == ([1] * 6, 5)
    rows.clear()
    assert generate.generate(loaded.model, loaded.tokenizer, asked, 256, 6) == alone
    assert rows == [6, 5, 4, 3, 2]  # each leaves when its own room is used
    assert min(room) < max(room) < 60


def test_perplexity_of_a_uniform_model_is_its_vocabulary(tiny_model: Path) -> None:
    loaded = models.load(tiny_model, "tiny")
    with torch.no_grad():
        loaded.model.model.norm.weight.zero_()
    encoded = encoding.encode(loaded.tokenizer, examples()[:3], loaded.stop_ids, "assistant", 256).items
    assert generate.perplexity(loaded.model, encoded, 0, 2) == pytest.approx(1024, rel=1e-4)


@pytest.mark.parametrize(
    ("precision", "native", "bf16", "warned"),
    [
        ("auto", True, True, False),
        ("auto", False, False, False),
        ("fp32", True, False, False),
        ("bf16", True, True, False),
        ("bf16", False, True, True),
    ],
)
def test_bf16_is_taken_where_it_is_native_or_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precision: str,
    native: bool,
    bf16: bool,
    warned: bool,
) -> None:
    monkeypatch.setattr(models, "computes_bf16", lambda where: native)
    assert models.in_bf16(precision, torch.device("cpu")) is bf16
    assert ("only emulates bf16" in caplog.text) is warned


def test_this_cpu_is_asked() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert models.computes_bf16(torch.device("cpu")) is ("avx512bw" in flags or "avx_ne_convert" in flags)
