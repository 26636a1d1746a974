"""Rows of every kind at once, a quarter of them done before: what a tick's Python takes, as the summary says it.

python -m tests.mixed_rows [rows] [overrides ...]

Chat and completions, tools, stop strings, logprobs, several choices, sampled rows with penalties, and rows that can't
be answered, of a tiny model with random weights. The first quarter is answered by a run of its own; the run that is
looked at answers the rest. Both print their summaries.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.checkpoints import write_checkpoint
from tests.support.tiny_tokenizer import CHAT_TEMPLATE, make_tokenizer

ROOT = Path(__file__).parents[1]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
WORDS = [
    "hello",
    "world",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "tells",
    "of",
    "17",
    "lands",
]


def make_row(number: int, rng: random.Random) -> str:
    """A line of the input, without its end; one of ten can't be answered."""
    text = " ".join(rng.choices(WORDS, k=rng.randrange(3, 40)))
    messages = [{"role": "user", "content": text}]
    common: dict[str, Any] = {"custom_id": f"row {number}", "max_tokens": rng.randrange(4, 32)}
    kinds: list[dict[str, Any] | str] = [
        {"prompt": text},
        {"messages": messages},
        {"messages": messages, "tools": [TOOL]},
        {"messages": messages, "stop": ["lo w", "zzz"], "metadata": {"of": number}},
        {"messages": messages, "logprobs": True, "top_logprobs": 5},
        {"prompt": text, "logprobs": 3, "stop": ["e"]},
        {"prompt": text, "n": 3, "temperature": 0.8, "seed": number},
        {"messages": messages, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, "presence_penalty": 0.5},
        {"prompt": text, "temperature": 1.0, "top_k": 20, "logit_bias": {"7": 2.0}},
    ]
    bad: list[dict[str, Any] | str] = [
        "{",
        {"prompt": text, "temprature": 1},
        {"prompt": "a" * 2_000},
        {"messages": []},
    ]
    kind = rng.choice(bad) if rng.random() < 0.1 else rng.choice(kinds)
    return kind if isinstance(kind, str) else json.dumps(common | kind)


def answer(folder: Path, lines: list[str], overrides: list[str]) -> None:
    """Answer the lines; those that the output in the folder has already are passed over."""
    (folder / "in.jsonl").write_text("".join(line + "\n" for line in lines))
    command = [str(ROOT / "launch" / "local.sh"), f"model.path={folder / 'model'}", f"input={folder / 'in.jsonl'}"]
    command += [f"output={folder / 'out.jsonl'}", f"run_dir={folder / 'run'}", "topology=pp2", "device=cpu"]
    command += ["model.dtype=float32", "scheduler.max_num_seqs=32", "progress=false", *overrides]
    env = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=env, check=True)


def main(rows: int, overrides: list[str]) -> None:
    rng = random.Random(0)
    lines = [make_row(number, rng) for number in range(rows)]
    with tempfile.TemporaryDirectory(prefix="mixed") as name:
        folder = Path(name)
        tokenizer = make_tokenizer()
        tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT_TEMPLATE
        write_checkpoint(folder / "model", "Qwen3ForCausalLM", vocab_size=len(tokenizer))
        tokenizer.save_pretrained(folder / "model")
        answer(folder, lines[: rows // 4], overrides)
        answer(folder, lines, overrides)
        answered = (folder / "out.jsonl").read_text().splitlines()
        assert len(answered) == rows, f"{len(answered)} answers of {rows} rows"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000, sys.argv[2:])
