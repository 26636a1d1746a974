"""A tokenizer with byte fallback, as Llama 2's: words with SentencePiece's space, and all bytes, built in memory."""

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

WORDS = ["▁hello", "▁wor", "ld", "▁", "a", "\N{REPLACEMENT CHARACTER}"]
FIRST_BYTE = 3


def make_byte_fallback() -> PreTrainedTokenizerFast:
    """Ids: 0 to 2 special tokens, of which 2 stands in prompts; bytes from 3; then WORDS."""
    tokens = ["<s>", "</s>", "[/INST]", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocab = {token: place for place, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["[/INST]"],
        clean_up_tokenization_spaces=False,
    )


def bytes_of(text: str) -> list[int]:
    """A text as tokens of bytes."""
    return [FIRST_BYTE + byte for byte in text.encode()]


def word(text: str) -> int:
    return FIRST_BYTE + 256 + WORDS.index(text)
