"""Texts far longer than the model takes are refused by a part of them, and no text is that fits."""

import json
import random
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spmd.api.rows import BadRow, Job, RowParser
from spmd.config import SamplingConfig
from tests.support.byte_fallback import make_byte_fallback
from tests.support.tiny_tokenizer import make_tokenizer

MILLION = 10**6
ROOM = 64  # tokens of a request
# Writes each call as JSON, so that none of them is found as Python shows it.
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "{% endfor %}"
)


class Counting:
    """A tokenizer that keeps count of the characters that it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.characters = 0

    def encode(self, text: str, **options: Any) -> list[int]:
        self.characters += len(text)
        ids: list[int] = self.tokenizer.encode(text, **options)
        return ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def shrinking() -> PreTrainedTokenizerFast:
    """Spaces collapse and those at the ends go; a word that isn't known is one token, and so are several in a row."""
    vocab = {"[UNK]": 0, "hello": 1, "world": 2}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence([normalizers.Replace(Regex(" +"), " "), normalizers.Strip()])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def parse(tokenizer: Any, row: dict[str, Any], room: int = ROOM) -> Job | BadRow:
    parser = RowParser(tokenizer, {}, SamplingConfig(), room, MILLION, MILLION)
    return parser.parse(json.dumps(row, ensure_ascii=False).encode(), 0)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hello world " * (MILLION // 12)},
        {"prompt": ["hello", "a" * MILLION]},
        {"prompt": " " * MILLION},
        {"prompt": "\N{CJK UNIFIED IDEOGRAPH-6F22}" * MILLION},
        {"messages": [{"role": "user", "content": "hello " * (MILLION // 6)}]},
    ],
    ids=["words", "second", "spaces", "characters", "chat"],
)
def test_a_text_much_too_long_is_refused_by_its_beginning(row: dict[str, Any]) -> None:
    tokenizer = Counting(make_tokenizer())
    bad = parse(tokenizer, row)
    assert isinstance(bad, BadRow) and bad.code == "context_length_exceeded"
    assert tokenizer.characters < MILLION // 10
    assert " characters, of which the first 65788 are " in bad.message
    assert bad.message.endswith(f" tokens, max_model_len is {ROOM}, and at least one token of output must fit")


def test_tool_calls_are_not_looked_for_one_by_one_in_a_text_much_too_long() -> None:
    """Each of them in all of it, it would take minutes: far more than the test's time."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    calls = [{"function": {"name": "f", "arguments": json.dumps({"a": f"{i}'"})}} for i in range(100_000)]
    bad = parse(tokenizer, {"messages": [{"role": "assistant", "content": "", "tool_calls": calls}]})
    assert isinstance(bad, BadRow) and bad.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (" " * MILLION + "hello" + " " * MILLION + "world" + " " * MILLION, [1, 2]),
        ("x" * MILLION + " hello", [0, 1]),
        ("hello " * 40 + "x" * MILLION, [1] * 40 + [0]),
    ],
    ids=["spaces", "unknown", "unknown at the end"],
)
def test_a_text_that_the_tokenizer_makes_short_is_taken(text: str, ids: list[int]) -> None:
    job = parse(shrinking(), {"prompt": text})
    assert isinstance(job, Job) and job.prompts[0].tokens.tolist() == ids


@pytest.mark.parametrize("make", [make_tokenizer, make_byte_fallback, shrinking], ids=lambda make: make.__name__)
def test_the_verdict_is_that_of_all_of_the_text(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of random texts around the limit, with beginnings as short as they can be."""
    monkeypatch.setattr("spmd.api.prompts.SHORTEST_BEGINNING", 16)
    monkeypatch.setattr("spmd.api.prompts.CHARACTERS_OF_A_TOKEN", 1)
    tokenizer, rng, fitted = make(), random.Random(0), 0
    pieces = [
        "hello",
        " world",
        " ",
        "    ",
        "a",
        "ü",
        "\N{CJK UNIFIED IDEOGRAPH-6F22}",
        "\N{GRINNING FACE}",
        "\n",
        "<eos>",
    ]
    for _ in range(400):
        text = "".join(rng.choice(pieces) * rng.choice([1, 1, 1, 9]) for _ in range(rng.randrange(1, 60)))
        ids = tokenizer.encode(text)
        made = parse(tokenizer, {"prompt": text}, room=64)
        fits = 0 < len(ids) < 64
        fitted += fits
        assert isinstance(made, Job) == fits
        assert not isinstance(made, Job) or made.prompts[0].tokens.tolist() == ids
    assert 20 < fitted < 400
