from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import spmd.demo
from spmd.demo.tokenizer import VOCABULARY, build_tokenizer

MODEL = Path(spmd.demo.__file__).parent / "model"


@pytest.fixture(scope="module", params=["built", "shipped"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return build_tokenizer() if request.param == "built" else AutoTokenizer.from_pretrained(MODEL)


def test_one_token_a_character_and_back(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("347+218=565").input_ids
    assert [VOCABULARY[i] for i in ids] == list("347+218=565")
    assert tokenizer.decode(ids) == "347+218=565"


def test_answer_is_plain_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [*tokenizer("565").input_ids, tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "565"


def test_spaces_are_ignored_and_other_characters_unknown(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer("347 + 218 =").input_ids == tokenizer("347+218=").input_ids
    assert tokenizer("x").input_ids == [tokenizer.unk_token_id]


def test_chat_asks_the_same_as_a_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "347+218="}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "347+218="
