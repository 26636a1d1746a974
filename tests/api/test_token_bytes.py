"""Texts, log-probabilities and offsets where characters are spread over tokens."""

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from spmd.api.answers import Finished, Head, answer_line, complete
from spmd.api.choices import Completion, chat_choice, text_choice
from spmd.api.rows import Job, RowParser
from spmd.api.token_bytes import finished_text, token_bytes
from spmd.api.tokenizer import StopChecker, output_text
from spmd.config import SamplingConfig
from spmd.schedule.request import SamplingParams, TokenLogprobs
from tests.support.byte_fallback import bytes_of, make_byte_fallback, word
from tests.support.tiny_tokenizer import make_tokenizer

FALLBACK, BYTE_LEVEL = make_byte_fallback(), make_tokenizer()
CONTROL = 2
HELLO, WOR = word("▁hello"), word("▁wor")


def ids(text: str) -> list[int]:
    tokens: list[int] = BYTE_LEVEL.encode(text, add_special_tokens=False)
    return tokens


def token_bytes_of(token: int, tokenizer: Any = BYTE_LEVEL) -> bytes:
    return token_bytes(tokenizer, token, tokenizer.decode([token], clean_up_tokenization_spaces=False))


def as_transformers(tokenizer: Any, prompt: list[int], output: list[int]) -> str:
    """What decoding all adds to the prompt's text."""
    before, whole = (tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (prompt, prompt + output))
    assert whole.startswith(before)
    added: str = whole[len(before) :]
    return added


# -- the prompt's end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        [HELLO, *bytes_of("😀😀"), CONTROL],
        [HELLO, *bytes_of("😀😀😀"), CONTROL, CONTROL],
        [HELLO, *bytes_of("日本語")],
        [*bytes_of("é" * 9), CONTROL],
        [HELLO, *bytes_of("😀"), WOR],
        bytes_of("😀"),
    ],
)
@pytest.mark.parametrize("output", [bytes_of("é!"), bytes_of("😀😀"), [HELLO, WOR], [CONTROL, *bytes_of("日"), WOR]])
def test_an_answer_behind_characters_of_several_bytes_is_as_transformers_decodes_it(
    prompt: list[int], output: list[int]
) -> None:
    expected = as_transformers(FALLBACK, prompt, output)
    assert output_text(FALLBACK, prompt, output, True) == expected
    checker = StopChecker(FALLBACK, prompt, SamplingParams(stop=("never",)))
    assert [checker.push(token) for token in output] == [None] * len(output)
    assert checker.text == expected


def test_a_prompt_of_a_long_run_of_characters_begins_with_a_whole_one() -> None:
    rng = random.Random(0)
    for _ in range(200):
        prompt = [HELLO, *bytes_of("".join(rng.choice("é日😀a") for _ in range(rng.randrange(12)))), CONTROL]
        output = bytes_of("".join(rng.choice("é日😀a") for _ in range(4)))
        assert output_text(FALLBACK, prompt, output, True) == as_transformers(FALLBACK, prompt, output)


@pytest.mark.parametrize(("tokenizer", "encode"), [(FALLBACK, bytes_of), (BYTE_LEVEL, ids)])
def test_a_character_that_the_prompt_begins_and_the_output_ends_is_the_outputs(tokenizer: Any, encode: Any) -> None:
    euro = encode("€")
    assert output_text(tokenizer, [*encode("a"), *euro[:1]], [*euro[1:], *encode("b")], True) == "€b"
    after = [word("a")] if tokenizer is FALLBACK else encode("a")
    assert output_text(tokenizer, euro[:2], after, True) == "a"  # it stays the prompt's
    assert output_text(tokenizer, euro[:1], euro[1:2], True) == ""


def test_a_prompt_that_holds_the_replacement_character_itself() -> None:
    broken = [word("\N{REPLACEMENT CHARACTER}")] * 3
    assert output_text(FALLBACK, [HELLO, *broken], [*broken, WOR], True) == "\N{REPLACEMENT CHARACTER}" * 3 + " wor"


# -- the answer's end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokenizer", "encode"), [(FALLBACK, bytes_of), (BYTE_LEVEL, ids)])
@pytest.mark.parametrize("whole", ["a", "é", "😀", "a😀日", ""])
@pytest.mark.parametrize("half", ["é", "日", "😀"])
def test_half_a_character_at_the_end_is_left_out(tokenizer: Any, encode: Any, whole: str, half: str) -> None:
    for cut in range(1, len(half.encode())):
        output = [*encode(whole), *encode(half)[:cut]]
        assert output_text(tokenizer, encode("x"), output, True) == whole
        assert output_text(tokenizer, encode("x"), [*output, CONTROL], True) == whole if tokenizer is FALLBACK else True


def test_bytes_that_are_no_character_are_left_out_at_the_end_and_kept_within() -> None:
    first = ids("€")[:1]
    assert output_text(BYTE_LEVEL, ids("x"), [*ids("a"), *first * 4], True) == "a"
    assert output_text(BYTE_LEVEL, ids("x"), [*first, *ids("a"), *first], True) == "\N{REPLACEMENT CHARACTER}a"


def test_the_replacement_character_stays_where_it_was_written_as_such() -> None:
    written = "a\N{REPLACEMENT CHARACTER}"
    assert output_text(BYTE_LEVEL, ids("x"), ids(written), True) == written
    assert output_text(BYTE_LEVEL, ids("x"), [*ids(written), *ids("😀")[:3]], True) == written
    assert output_text(FALLBACK, [HELLO], bytes_of(written), True) == written
    assert output_text(FALLBACK, [HELLO], [word("a"), word("\N{REPLACEMENT CHARACTER}")], True) == written


def test_of_a_token_with_more_than_half_a_character_the_rest_stays() -> None:
    class Joined:
        """A vocabulary with a token for a space and half a character, as GPT-2's has."""

        pieces = ("ĠðŁ", "a", "ĺĢ")

        def convert_ids_to_tokens(self, token: int) -> str:
            return self.pieces[token]

        def decode(self, tokens: Sequence[int], **_: Any) -> str:
            levels = {"Ġ": b" ", "ð": b"\xf0", "Ł": b"\x9f", "a": b"a", "ĺ": b"\x98", "Ģ": b"\x80"}
            return b"".join(levels[c] for token in tokens for c in self.pieces[token]).decode(errors="replace")

    assert finished_text(Joined(), [1, 0], True) == "a "
    assert finished_text(Joined(), [1, 0, 2], True) == "a 😀"


def test_an_answer_cut_by_length_ends_with_a_whole_character() -> None:
    parser = RowParser(BYTE_LEVEL, {}, SamplingConfig(), 64, 1000, 269)
    job = parser.parse(json.dumps({"prompt": "hello", "max_tokens": 4}).encode(), 0)
    assert isinstance(job, Job)
    [request] = job.requests
    request.output.extend([*ids("a"), *ids("😀")[:3]])
    done = complete(BYTE_LEVEL, Finished.of(request, "length"))
    assert (done.text, len(done.token_ids)) == ("a", 4)
    body = json.loads(answer_line(Head.of(job), [done], "tiny", BYTE_LEVEL))["response"]["body"]
    assert body["choices"][0]["text"] == "a" and body["usage"]["completion_tokens"] == 4


# -- log-probabilities ------------------------------------------------------------------------------------------------


def flat(tokens: Sequence[int]) -> list[TokenLogprobs]:
    return [TokenLogprobs(-1.0, 1, [(token, -1.0)]) for token in tokens]


@pytest.mark.parametrize(
    ("tokenizer", "tokens"),
    [
        (BYTE_LEVEL, ids("hello world 😀é日\N{REPLACEMENT CHARACTER}")),
        (FALLBACK, [HELLO, WOR, *bytes_of(" 😀é日a\n")]),
        (FALLBACK, [word("▁"), word("a"), word("\N{REPLACEMENT CHARACTER}")]),
    ],
)
def test_the_bytes_of_a_chats_tokens_are_those_of_its_text(tokenizer: Any, tokens: list[int]) -> None:
    choice = chat_choice(0, Completion("", tokens, "length", None, flat(tokens)), tokenizer)
    said = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
    top = b"".join(bytes(entry["top_logprobs"][0]["bytes"]) for entry in choice["logprobs"]["content"])
    assert said == top
    assert said.decode() == output_text(tokenizer, [word("a") if tokenizer is FALLBACK else 5], tokens, True)


def test_bytes_of_special_and_unknown_tokens() -> None:
    assert token_bytes_of(1) == b"<eos>" and token_bytes_of(CONTROL, FALLBACK) == b"[/INST]"
    assert token_bytes_of(100_000) == b""  # of a padded embedding
    assert all(token_bytes_of(3 + byte, FALLBACK) == bytes([byte]) for byte in range(256))
    assert sorted(token_bytes_of(token) for token in range(5, 261)) == [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize(
    ("sampled", "top", "expected"),
    [
        (HELLO, [(HELLO, -0.49), (word("▁wor"), -2.0)], {"hello": -0.49, "wor": -2.0}),
        (bytes_of("é")[0], [(bytes_of("é")[0], -0.49), (bytes_of("é")[1], -4.0)], {"�": -0.49}),
        (bytes_of("é")[1], [(bytes_of("é")[0], -0.49), (bytes_of("é")[1], -4.0)], {"�": -4.0}),
        (HELLO, [(bytes_of("a")[0], -0.5), (word("a"), -3.0), (HELLO, -9.0)], {"hello": -9.0, "a": -0.5}),
        (word("a"), [(bytes_of("a")[0], -0.5), (HELLO, -3.0)], {"a": -1.0, "hello": -3.0}),
    ],
)
def test_of_tokens_with_one_text_the_first_stands_for_all_and_the_sampled_one_for_itself(
    sampled: int, top: list[tuple[int, float]], expected: dict[str, float]
) -> None:
    own = dict(top).get(sampled, -1.0)
    done = Completion("", [sampled], "length", None, [TokenLogprobs(own, 1, top)])
    logprobs = text_choice(0, done, FALLBACK)["logprobs"]
    assert logprobs["top_logprobs"] == [expected] and logprobs["token_logprobs"] == [own]


def test_offsets_are_those_of_the_text_where_characters_are_spread_over_tokens() -> None:
    text = "a😀hello é日x"
    tokens = ids(text)
    logprobs = text_choice(0, Completion(text, tokens, "length", None, flat(tokens)), BYTE_LEVEL)["logprobs"]
    ends = [len(BYTE_LEVEL.decode(tokens[:place]).rstrip("�")) for place in range(len(tokens))]
    assert logprobs["text_offset"] == ends
