"""What the engine must answer: random checkpoints of every family, rows that exercise it, and transformers' tokens.

Greedy tokens are those of transformers' own `generate`, sampled ones are drawn by our sampler from transformers'
logits. Neither knows of batches, blocks, chunks or ranks.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from spmd.api.rows import Job, RowParser
from spmd.config import SamplingConfig
from spmd.sampling.sampler import Sampler
from tests.support.checkpoints import SCALINGS, write_checkpoint
from tests.support.tiny_tokenizer import make_tokenizer

VOCAB = 269  # the tiny tokenizer's, and odd, so that two tensor ranks have to pad it
EOS = 1
MAX_MODEL_LEN = 512
LONGEST = 24  # tokens of an output
NEAR_TIE = 3e-4  # logits closer than this may swap by the order of summation; theirs differ by some 1e-6

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # Tied, so that the last stage needs the embedding of the first; seven layers for uneven stages.
    "qwen3": ("Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3_7": ("Qwen3ForCausalLM", {"num_hidden_layers": 7, "tie_word_embeddings": True}),
    "qwen3_untied": ("Qwen3ForCausalLM", {"tie_word_embeddings": False}),
    "llama": ("LlamaForCausalLM", {}),
    "llama_linear": ("LlamaForCausalLM", {"rope_parameters": SCALINGS["linear"]}),
    "llama_llama3": ("LlamaForCausalLM", {"rope_parameters": SCALINGS["llama3"], "tie_word_embeddings": True}),
    "llama_yarn": ("LlamaForCausalLM", {"rope_parameters": SCALINGS["yarn"]}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 7}),
    "qwen2": ("Qwen2ForCausalLM", {"shard": "100KB", "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"decoder_sparse_step": 2}),
    "mixtral": ("MixtralForCausalLM", {}),
}

Choice = tuple[list[int], str, int | str | None]  # token ids, finish_reason, stop_reason
Answer = list[Choice]


@dataclass(frozen=True)
class Task:
    """A checkpoint, a file of rows, and the right answers by custom_id."""

    model: str  # folder
    input: str
    answers: dict[str, Answer]


def make_task(name: str, folder: Path) -> Task:
    """Write the checkpoint `name` of MODELS and its rows below `folder`, and compute the answers."""
    family, overrides = MODELS[name]
    path = write_checkpoint(folder / name, family, vocab_size=VOCAB, **overrides)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = make_tokenizer()
    prompts, outputs = clear_prompts(model)
    rows = [*greedy_rows(prompts), *stopping_rows(prompts, outputs, tokenizer), *sampled_rows(prompts)]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = {}
    for row in rows:
        if row["temperature"]:
            answers[row["custom_id"]] = sampled(model, row)
        else:
            output = outputs[prompts.index(row["prompt"])][: row["max_tokens"]]
            answers[row["custom_id"]] = [ended(output, row, tokenizer)]
    assert [answers[f"stop-{what}"][0][1] for what in ("token", "string", "none")] == ["stop", "stop", "length"]
    return Task(path, str(file), answers)


def clear_prompts(model: PreTrainedModel) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts with greedy outputs that come near no tie: which of two equal logits is larger is anybody's guess."""
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        long = torch.randint(5, VOCAB, (33,), generator=generator).tolist()
        short = [torch.randint(5, VOCAB, (n,), generator=generator).tolist() for n in (1, 8, 9, 16, 23)]
        prompts = [long, [*long[:20], *short[3]], *short]
        generated = [greedy(model, prompt) for prompt in prompts]
        if min(gap for _, gap in generated) > NEAR_TIE:
            return prompts, [output for output, _ in generated]
    raise AssertionError("every prompt comes near a tie")


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], float]:
    """Tokens of transformers' `generate`, and by how much the closest choice was made."""
    answer = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=LONGEST,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(answer.logits).topk(2).values
    return answer.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).min().item()


def greedy_rows(prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Lengths from one token up, every prompt twice: the second finds the prefix of the first."""
    lengths = (LONGEST, 1, 17, 20, 9, LONGEST, 13, 2, 11, 5, 3, 16, 8, 12)
    chosen = [*prompts, *reversed(prompts)]
    return [make_row(f"greedy-{i}", chosen[i], length, priority=-i % 3) for i, length in enumerate(lengths)]


def stopping_rows(
    prompts: list[list[int]], outputs: list[list[int]], tokenizer: PreTrainedTokenizerFast
) -> list[dict[str, Any]]:
    """Rows that end by a stop token, by a stop string, and by none of theirs."""
    texts = [(place, printable(tokenizer, output)) for place, output in enumerate(outputs)]
    place, text = max(texts, key=lambda entry: len(entry[1]))
    assert len(text) > 1
    return [
        make_row("stop-token", prompts[1], LONGEST, stop_token_ids=[outputs[1][6]]),
        make_row("stop-string", prompts[place], LONGEST, stop=[text]),
        make_row("stop-none", prompts[2], 10, stop=["no such text", "nor this"], min_tokens=3),
    ]


def printable(tokenizer: PreTrainedTokenizerFast, output: list[int]) -> str:
    """A piece of an output's text: the longest printable one behind its fourth token, cut to three characters."""
    text = tokenizer.decode(output[4:], skip_special_tokens=True)
    pieces = "".join(c if c.isascii() and c.isprintable() else "\n" for c in text).split("\n")
    return max(pieces, key=len)[:3]


BIASED = {"repetition_penalty": 1.2, "frequency_penalty": 0.4, "logit_bias": {"7": 3.0}}


def sampled_rows(prompts: list[list[int]]) -> list[dict[str, Any]]:
    return [
        make_row("sampled", prompts[2], 12, temperature=1.0, n=2, seed=7),
        make_row("sampled-cut", prompts[3], 12, temperature=0.7, top_k=50, top_p=0.9, seed=8),
        make_row("sampled-penalised", prompts[5], 10, temperature=1.3, min_p=0.01, presence_penalty=1.0, seed=9),
        make_row("sampled-biased", prompts[4], 8, temperature=0.9, n=3, seed=10, logprobs=2, **BIASED),
    ]


def make_row(custom_id: str, prompt: list[int], max_tokens: int, **keys: Any) -> dict[str, Any]:
    fixed = {"custom_id": custom_id, "prompt": prompt, "max_tokens": max_tokens, "return_token_ids": True}
    return fixed | {"temperature": 0.0} | keys


def ended(output: list[int], row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> Choice:
    """An output up to where its row ends it."""
    for length, token in enumerate(output, start=1):
        if token == EOS:
            return output[:length], "stop", None
        if token in row.get("stop_token_ids", ()):
            return output[:length], "stop", token
        text = tokenizer.decode(output[:length], skip_special_tokens=True)
        if found := [stop for stop in row.get("stop", ()) if stop in text]:
            return output[:length], "stop", found[0]
    return output, "length", None


@torch.inference_mode()
def sampled(model: PreTrainedModel, row: dict[str, Any]) -> Answer:
    """Each choice token by token, the whole sequence anew for each."""
    parser = RowParser(make_tokenizer(), {}, SamplingConfig(), MAX_MODEL_LEN, MAX_MODEL_LEN, VOCAB)
    job = parser.parse(json.dumps(row).encode(), 0)
    assert isinstance(job, Job)
    sampler = Sampler(VOCAB, "cpu")
    for request in job.requests:
        while len(request.output) < row["max_tokens"] and EOS not in request.output:
            logits: Tensor = model(torch.tensor([[*request.tokens()]])).logits[:, -1]
            request.output += sampler.sample(logits, [request], [request.num_tokens]).token_ids.tolist()
    return [ended(list(request.output), row, parser.tokenizer) for request in job.requests]
