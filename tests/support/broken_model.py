"""A checkpoint with one token whose embedding is NaN or infinite: rows that hold it have logits that are no numbers."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.support.checkpoints import write_checkpoint
from tests.support.oracle import NEAR_TIE, VOCAB, greedy

LENGTHS = (1, 5, 23, 33)  # tokens of the prompts


@dataclass(frozen=True)
class BrokenModel:
    """`bad` is in none of the prompts and outputs."""

    path: str
    bad: int
    prompts: list[list[int]]
    outputs: list[list[int]]  # transformers' greedy tokens
    spoilt: list[int]  # a prompt whose output holds `bad` at `spoilt_at`, counted from 1
    spoilt_at: int


def break_model(folder: Path, family: str, value: float, bad: int | None = None, **overrides: object) -> BrokenModel:
    """Write the checkpoint. `bad`: the token that is broken, by default one that an output of the whole model holds."""
    values: dict[str, object] = {"vocab_size": VOCAB, "tie_word_embeddings": False} | overrides
    path = write_checkpoint(folder, family, **values)  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    spoilt, at = [7, 8, 9], 4
    if bad is None:
        output, _ = greedy(model, spoilt)
        at = next(i for i in range(2, len(output)) if output[i] not in output[:i])
        bad = output[at]
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = value
    model.save_pretrained(folder)
    prompts, outputs = [], []
    for length in LENGTHS:
        prompt, output = _sound(model, bad, length, generator)
        prompts.append(prompt)
        outputs.append(output)
    return BrokenModel(path, bad, prompts, outputs, spoilt, at + 1)


def _sound(model: PreTrainedModel, bad: int, length: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """A prompt and its output, without the bad token and without near ties."""
    while True:
        prompt = torch.randint(5, VOCAB, (length,), generator=generator).tolist()
        output, gap = greedy(model, prompt)
        if bad not in prompt + output and gap > NEAR_TIE:
            return prompt, output
