from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import spmd.demo
from spmd.demo.sums import held_out, prompt

MODEL = Path(spmd.demo.__file__).parent / "model"


def test_checkpoint_is_small() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 3_000_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_transformers_adds_what_it_never_saw(dtype: torch.dtype) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)
    pairs = held_out()[:200]
    inputs = tokenizer([prompt(a, b) for a, b in pairs], padding=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs.input_ids.shape[1] :]
    answers = tokenizer.batch_decode(output, skip_special_tokens=True)
    right = sum(text == str(a + b) for text, (a, b) in zip(answers, pairs, strict=True))
    assert right >= 198
    assert (output == tokenizer.eos_token_id).any(1).all()
