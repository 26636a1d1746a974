"""Trains the checkpoint in `spmd/demo/model`: a four-layer Qwen3 that adds two numbers, digit by digit as written.

`python -m spmd.demo.train` repeats it: batches come from a seeded CPU generator and kernels are deterministic, so one
machine and one version of torch give one checkpoint. A few minutes on a GPU, hours on a CPU.
"""

import argparse
import math
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen3Config, Qwen3ForCausalLM

from spmd.demo.sums import LIMIT, held_out, prompt
from spmd.demo.tokenizer import VOCABULARY, build_tokenizer

HERE = Path(__file__).parent / "model"
LENGTH = len("999+999=1998") + 1  # the longest sum and its <eos>
PAD, EOS, EQUALS = (VOCABULARY.index(token) for token in ("<pad>", "<eos>", "="))


def model_config() -> Qwen3Config:
    """0.8 million parameters; every count divides by two for tp=2, and four layers allow pp=4."""
    return Qwen3Config(
        vocab_size=len(VOCABULARY) + len(VOCABULARY) % 2,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        attn_implementation="eager",  # its backward is deterministic
    )


def all_sums() -> Tensor:
    """Token ids [LIMIT * LIMIT, LENGTH] of `a+b=c<eos>`, padded on the right; row a * LIMIT + b."""
    ids = torch.full((256,), PAD, dtype=torch.uint8)
    for i, token in enumerate(VOCABULARY):
        if len(token) == 1:
            ids[ord(token)] = i
    ids[ord("$")] = EOS
    sums = (f"{prompt(a, b)}{a + b}$".ljust(LENGTH) for a in range(LIMIT) for b in range(LIMIT))
    text = torch.frombuffer(bytearray("".join(sums).encode()), dtype=torch.uint8)
    return ids[text.int()].view(-1, LENGTH)


def answer_mask(tokens: Tensor) -> Tensor:
    """Where tokens [rows, LENGTH] belong to the answer, its <eos> included: what the model has to predict."""
    equals = tokens == EQUALS
    return (equals.cumsum(1) - equals.int() > 0) & (tokens != PAD)


def draw(batch: int, is_test: Tensor, generator: torch.Generator) -> Tensor:
    """Rows of `all_sums` to train on, [about batch]: never one marked in is_test [LIMIT * LIMIT].

    Operands below 10 and 100 come oftener than by chance, or they would hardly be seen.
    """
    shares = torch.tensor([0.1, 0.2, 0.7])
    limits = torch.tensor([10, 100, LIMIT])[torch.multinomial(shares, 2 * batch, True, generator=generator)]
    a, b = (torch.rand(2 * batch, generator=generator) * limits).long().view(2, batch)
    rows: Tensor = a * LIMIT + b
    return rows[~is_test[rows]]


def train(args: argparse.Namespace, sums: Tensor, is_test: Tensor) -> Qwen3ForCausalLM:
    """Train a fresh model on `args.steps` batches drawn from sums [LIMIT * LIMIT, LENGTH]."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = Qwen3ForCausalLM(model_config()).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 20 * step / args.steps) * (1 + math.cos(math.pi * step / args.steps)) / 2
    )
    for step in range(1, args.steps + 1):
        tokens = sums[draw(args.batch, is_test, generator)].long()
        labels = tokens.masked_fill(~answer_mask(tokens), -100)[:, 1:].to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            logits = model(input_ids=tokens[:, :-1].to(args.device), use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == args.steps:
            print(f"step {step}: loss {loss.item():.5f}", flush=True)
    return model


@torch.inference_mode()
def accuracy(path: Path, tokens: Tensor, dtype: torch.dtype, device: str) -> float:
    """Share of the sums tokens [rows, LENGTH] that the checkpoint answers in full, digits and <eos>.

    Every answer token is predicted from the right ones before it; all are right exactly if greedy decoding is.
    """
    model = Qwen3ForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    right = 0
    for rows in tokens.split(4096):
        guess = model(input_ids=rows[:, :-1].to(device), use_cache=False).logits.argmax(-1).cpu()
        right += int((~answer_mask(rows)[:, 1:] | (guess == rows[:, 1:])).all(1).sum())
    return right / len(tokens)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint.")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=HERE)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    torch.use_deterministic_algorithms(True)
    sums = all_sums()
    test = torch.tensor([a * LIMIT + b for a, b in held_out()])
    is_test = torch.zeros(len(sums), dtype=torch.bool)
    is_test[test] = True

    train(args, sums, is_test).to(torch.bfloat16).save_pretrained(args.out)
    build_tokenizer().save_pretrained(args.out)

    for dtype in (torch.float32, torch.bfloat16):
        share = accuracy(args.out, sums[test].long(), dtype, args.device)
        print(f"held-out accuracy in {dtype}: {share:.4%} of {len(test)} sums")


if __name__ == "__main__":
    main()
