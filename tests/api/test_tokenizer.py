import json
import random
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models

from spmd.api import tokenizer as tokenizer_module
from spmd.api.token_bytes import decode
from spmd.api.tokenizer import CONTEXT, MOST_PENDING, StopChecker, load_generation_config, load_tokenizer, output_text
from spmd.schedule.request import SamplingParams
from tests.support.byte_fallback import bytes_of, make_byte_fallback, word
from tests.support.tiny_tokenizer import make_tokenizer

TOKENIZER = make_tokenizer()


def ids(text: str) -> list[int]:
    tokens: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return tokens


def checker_of(prompt: Sequence[int], *stop: str, **options: Any) -> StopChecker:
    return StopChecker(TOKENIZER, prompt, SamplingParams(stop=stop, **options))


def run(text: str, stop: Sequence[str], prompt: str = "hello", **options: Any) -> tuple[str | None, int, str]:
    """Push the tokens of `text`: the stop string, tokens needed, and text."""
    checker = checker_of(ids(prompt), *stop, **options)
    for token in ids(text):
        if found := checker.push(token):
            return found, len(checker.output), checker.text
    return None, len(checker.output), checker.text


def test_load_tokenizer(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "with")
    loaded = load_tokenizer(str(tmp_path / "with"))
    assert loaded is not None and loaded.encode("hello") == TOKENIZER.encode("hello")
    (tmp_path / "without").mkdir()
    assert load_tokenizer(str(tmp_path / "without")) is None
    (tmp_path / "without" / "tokenizer.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"no tokenizer could be loaded from .*without") as caught:
        load_tokenizer(str(tmp_path / "without"))
    assert "\n" not in str(caught.value)


def test_load_generation_config(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert load_generation_config(folder) == {"eos_token_id": None}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3, "hidden_size": 8}))
    assert load_generation_config(folder) == {"eos_token_id": 3}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4], "top_k": 20}))
    assert load_generation_config(folder) == {"eos_token_id": [3, 4], "top_k": 20}
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        load_generation_config(folder)


def test_output_text_with_and_without_special_tokens() -> None:
    output = [*ids("hello"), TOKENIZER.eos_token_id]
    assert output_text(TOKENIZER, ids("hi"), output, skip_special_tokens=True) == "hello"
    assert output_text(TOKENIZER, ids("hi"), output, skip_special_tokens=False) == "hello<eos>"
    assert output_text(None, [1], output, skip_special_tokens=True) == ""
    assert output_text(TOKENIZER, ids("hi"), [100_000], skip_special_tokens=True) == ""  # a padded embedding's


def test_output_text_keeps_the_space_that_sentencepiece_drops_at_the_start() -> None:
    class Metaspace:
        backend_tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))

    Metaspace.backend_tokenizer.decoder = decoders.Metaspace()
    assert output_text(Metaspace(), [0], [1, 0], skip_special_tokens=True) == " b a"


def test_output_text_where_the_prompt_ends_within_a_character() -> None:
    euro = ids("€")
    assert len(euro) == 3
    assert output_text(TOKENIZER, euro[:2], [*euro[2:], *ids("x")], True).endswith("x")


def test_stop_string_over_several_tokens() -> None:
    assert run("hello world", ["o w"]) == ("o w", 2, "hell")
    assert run("abcdef", ["cde"]) == ("cde", 5, "ab")
    assert run("abcdef", ["cde"], include_stop_str_in_output=True) == ("cde", 5, "abcde")
    assert run("abcdef", ["xyz"]) == (None, 6, "abcdef")


def test_the_earliest_stop_string_wins() -> None:
    assert run("hello", ["o", "ll"]) == ("ll", 1, "he")


def test_stop_string_within_one_token_and_at_the_start() -> None:
    assert run("hello", ["he"]) == ("he", 1, "")


def test_the_prompt_is_not_searched() -> None:
    assert run("x", ["lox", "hello"]) == (None, 1, "x")


def test_stop_strings_of_characters_of_several_bytes() -> None:
    assert run("a€b😀c", ["€b"]) == ("€b", 5, "a")
    assert run("a€b😀c", ["😀"]) == ("😀", 9, "a€b")


def test_min_tokens_holds_stop_strings_back() -> None:
    assert run("ababab", ["b"], min_tokens=3) == ("b", 4, "aba")


def test_special_tokens_within_a_stop_string() -> None:
    checker = checker_of([], "ab")
    assert [checker.push(token) for token in (*ids("a"), TOKENIZER.eos_token_id, *ids("b"))] == [None, None, "ab"]
    checker = checker_of([], "<eos>", skip_special_tokens=False)
    assert [checker.push(token) for token in (*ids("a"), TOKENIZER.eos_token_id)] == [None, "<eos>"]


def random_tokens(tokenizer: Any, chance: random.Random, wild: float) -> list[int]:
    """Tokens of words and of characters of several bytes; each with probability `wild` any token of all."""
    tokens: list[int] = []
    while len(tokens) < 40:
        text = chance.choice(["hello", " world", "€", "😀", "é", "a", "漢字"])
        any_token = [chance.randrange(len(tokenizer))]
        tokens += any_token if chance.random() < wild else tokenizer.encode(text, add_special_tokens=False)
    return tokens


def cases(tokenizer: Any, wild: tuple[float, ...]) -> Iterator[tuple[list[int], list[int], bool]]:
    """Prompts and outputs, cut anywhere, also within a character; and whether to skip special tokens."""
    chance = random.Random(0)
    for _ in range(400):
        tokens, cut = random_tokens(tokenizer, chance, chance.choice(wild)), chance.randrange(1, 30)
        yield tokens[:cut], tokens[cut:], chance.random() < 0.7


@pytest.mark.parametrize(
    ("tokenizer", "wild"),
    [(TOKENIZER, (0.0, 0.2)), (make_byte_fallback(), (0.0,))],  # bytes that are no character spoil those before them
    ids=["byte level", "byte fallback"],
)
def test_growing_text_equals_the_text_decoded_at_once(tokenizer: Any, wild: tuple[float, ...]) -> None:
    for prompt, output, skip in cases(tokenizer, wild):
        checker = StopChecker(tokenizer, prompt, SamplingParams(stop=("never found",), skip_special_tokens=skip))
        for length, token in enumerate(output, start=1):
            assert checker.push(token) is None
            assert checker.text == output_text(tokenizer, prompt, output[:length], skip)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, make_byte_fallback()], ids=["byte level", "byte fallback"])
def test_a_stop_string_cuts_the_text_that_the_answer_would_have(tokenizer: Any) -> None:
    chance, found = random.Random(1), 0
    for prompt, output, skip in cases(tokenizer, (0.0, 0.2)):
        whole = output_text(tokenizer, prompt, output, skip)
        at = chance.randrange(max(1, len(whole) - 1))
        stop = whole[at : at + chance.randrange(1, 4)]
        if not stop or "\N{REPLACEMENT CHARACTER}" in stop:
            continue
        checker = StopChecker(tokenizer, prompt, SamplingParams(stop=(stop,), skip_special_tokens=skip))
        length = next(length for length, token in enumerate(output, start=1) if checker.push(token) == stop)
        text = output_text(tokenizer, prompt, output[:length], skip)
        assert checker.text == text[: text.index(stop)]
        found += 1
    assert found > 100


def test_a_character_that_the_prompt_began_is_the_first_of_the_output() -> None:
    euro = ids("€")
    checker = checker_of([*ids("hello"), *euro[:2]], "never found")
    assert [checker.push(token) for token in [*euro[2:], *ids("x")]] == [None, None]
    assert checker.text == "€x"
    checker = checker_of([*ids("hello"), *euro[:2]], "€")
    assert checker.push(euro[2]) == "€" and checker.text == ""


def test_a_space_in_front_of_half_a_character_is_kept() -> None:
    tokenizer = make_byte_fallback()
    output = [word("a"), word("\N{LOWER ONE EIGHTH BLOCK}"), bytes_of("é")[0]]
    assert output_text(tokenizer, [word("a")], output, True) == "a "


@pytest.mark.parametrize("kind", ["skipped", "half"])
def test_tokens_that_bring_no_text_cost_no_more_the_more_there_are(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    token = TOKENIZER.all_special_ids[0] if kind == "skipped" else ids("é")[0]
    assert kind == "skipped" or TOKENIZER.decode([token]) == "\N{REPLACEMENT CHARACTER}"
    decoded: list[int] = []

    def counting(tokenizer: Any, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        decoded.append(len(tokens))
        return decode(tokenizer, tokens, skip_special_tokens)

    monkeypatch.setattr(tokenizer_module, "decode", counting)
    checker = checker_of(ids("hello"), "stop")
    assert all(checker.push(token) is None for _ in range(500))
    assert max(decoded) <= 2 * MOST_PENDING + CONTEXT and len(decoded) <= 5 * 500
    assert [checker.push(token) for token in ids(" stop")][-1] == "stop", "it goes on looking"


def test_templates_take_the_date_they_are_given(tmp_path: Path) -> None:
    made = make_tokenizer(tmp_path)
    made.chat_template = "{{ strftime_now('%d %b %Y') }}|{{ messages[0]['content'] }}"
    made.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), now=datetime(2020, 2, 3))
    assert loaded is not None
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "03 Feb 2020|hi"


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 500\n"


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer.model", "chat_template.jinja", "vocab.json", "merges.txt"]
)
def test_the_pointer_that_git_lfs_leaves(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(
        ValueError, match=rf"{name} is a Git LFS pointer, not the file itself: git lfs pull in its folder"
    ):
        load_tokenizer(str(tmp_path))


def test_the_pointer_in_the_place_of_generation_config(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(POINTER)
    with pytest.raises(ValueError, match=r"generation_config\.json is a Git LFS pointer"):
        load_generation_config(str(tmp_path))


@pytest.mark.parametrize(("there", "lacking"), [((), "sentencepiece and protobuf"), (("sentencepiece",), "protobuf")])
def test_a_vocabulary_of_sentencepiece_alone_names_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], lacking: str
) -> None:
    for name in ("sentencepiece", "protobuf"):
        monkeypatch.setattr(f"spmd.api.tokenizer.is_{name}_available", lambda name=name: name in there)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15")  # as SentencePiece's begin
    with pytest.raises(
        ValueError, match=f"tokenizer.model needs {lacking}: pip install {lacking.replace(' and', '')}, or"
    ):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_its_vocabulary(tmp_path: Path) -> None:
    """transformers makes one of three tokens of it, for which every prompt is unknown."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(
        ValueError, match=r"tokenizer_config\.json, but no vocabulary: tokenizer\.json or tokenizer\.model"
    ):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert load_tokenizer(str(tmp_path)) is not None
