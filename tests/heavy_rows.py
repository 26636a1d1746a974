"""Four rows that are far heavier than others among ordinary ones: the others' answers, and how much later they come.

python -m tests.heavy_rows [rows] [prompt] [overrides ...]

One row with 512 choices of a prompt of `prompt` tokens, one of 4,096 tokens with 20 logprobs each, one whose logits are
NaN, one of 16 MB. A tiny model with random weights answers the rows with them and without, at pp=2 dp=2. Printed are
seconds and TPOT of the ordinary rows; their answers must be equal.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from spmd.generate import cli
from spmd.report.metrics import Clock, Metrics
from spmd.schedule.request import Request
from tests.support.checkpoints import write_checkpoint
from tests.support.tiny_tokenizer import make_tokenizer

ROOT = Path(__file__).parents[1]
BROKEN = 100  # the token whose embedding is NaN
RECORD = "SPMD_TPOT"  # in the environment of ranks: the folder for what they recorded
HEAVY = 4


def heavy_rows(prompt: int) -> list[dict[str, Any]]:
    tokens = [5 + place % 90 for place in range(prompt)]
    return [
        {"custom_id": "choices", "prompt": tokens, "n": 512, "max_tokens": 4},
        {"custom_id": "logprobs", "prompt": [5, 6, 7], "max_tokens": 4096, "logprobs": 20},
        {"custom_id": "no numbers", "prompt": [5, BROKEN, 6], "max_tokens": 4},
        {"custom_id": "megabytes", "prompt": "a" * (16 * 2**20 - 100), "max_tokens": 4},
    ]


def make_rows(rows: int, prompt: int | None) -> list[dict[str, Any]]:
    """Ordinary ones, which are the same each time, and where `prompt` is given the heavy ones spread over them."""
    rng = random.Random(0)
    made = [
        {"custom_id": f"row {i}", "prompt": rng.choices(range(5, 95), k=rng.randrange(8, 64)), "max_tokens": 24}
        for i in range(rows)
    ]
    for place, heavy in enumerate(heavy_rows(prompt) if prompt else []):
        made.insert((place + 1) * rows // (HEAVY + 1), heavy)
    return made


def write_model(folder: Path, longest: int) -> None:
    tokenizer = make_tokenizer(folder)
    shape: dict[str, Any] = {"vocab_size": len(tokenizer), "tie_word_embeddings": False}
    write_checkpoint(folder, "Qwen3ForCausalLM", max_position_embeddings=longest, **shape)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[BROKEN] = float("nan")
        model.get_output_embeddings().weight[BROKEN] = 0.0
    model.save_pretrained(folder)


def answer(folder: Path, prompt: int | None, rows: int, overrides: list[str]) -> tuple[dict[str, Any], list[float]]:
    """Answers of the ordinary rows, and their seconds per output token."""
    folder.mkdir()
    lines = [json.dumps(row) + "\n" for row in make_rows(rows, prompt)]
    (folder / "in.jsonl").write_text("".join(lines))
    command = [sys.executable, str(ROOT / "launch" / "torchrun.py"), "--standalone", "--nproc-per-node", "4"]
    command += ["-m", "tests.heavy_rows", "topology=pp2dp2", f"model.path={folder.parent / 'model'}", "device=cpu"]
    command += [f"input={folder / 'in.jsonl'}", f"output={folder / 'out.jsonl'}", f"run_dir={folder / 'run'}"]
    command += ["model.dtype=float32", "sampling.temperature=0", "sampling.ignore_eos=true", "progress=false"]
    command += ["scheduler.max_num_seqs=32", *overrides]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), RECORD: str(folder)}
    subprocess.run(command, env=env, check=True)
    answers = {row["custom_id"]: row for row in map(json.loads, (folder / "out.jsonl").read_text().splitlines())}
    recorded = [pair for file in folder.glob("tpot-*") for pair in json.loads(file.read_text())]
    ordinary = {index for index, line in enumerate(lines) if '"custom_id": "row ' in line}
    return (
        {name: row for name, row in answers.items() if name.startswith("row ")},
        [seconds for index, seconds in recorded if index in ordinary],
    )


def rank() -> None:
    """`spmd.generate`, which leaves behind how long each row's tokens took."""
    found: list[tuple[int, float]] = []
    finished = Metrics.finished

    def record(metrics: Metrics, request: Request, clock: Clock, now: float) -> None:
        finished(metrics, request, clock, now)
        found.append((request.index, (clock.last - clock.first) / (clock.tokens - 1)))

    Metrics.finished = record  # type: ignore[method-assign, assignment]
    try:
        cli()
    finally:
        Path(os.environ[RECORD], f"tpot-{os.environ['RANK']}").write_text(json.dumps(found))


def main(rows: int, prompt: int, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="heavy") as name:
        folder = Path(name)
        write_model(folder / "model", prompt + 8192)
        without, usual = answer(folder / "without", None, rows, overrides)
        beside, slower = answer(folder / "with", prompt, rows, overrides)
    for called, seconds in (("without", usual), ("with", slower)):
        cuts = [1000 * cut for cut in quantiles(seconds, n=100)]
        print(f"{called:8} TPOT of {len(seconds)} ordinary rows (ms): p50 {cuts[49]:.2f}, p99 {cuts[98]:.2f}")
    assert beside == without, "ordinary rows have other answers"
    print("answers of ordinary rows are equal")


if __name__ == "__main__":
    if RECORD in os.environ:
        rank()
    else:
        rows, prompt = (int(number) for number in (sys.argv[1:3] if len(sys.argv) > 2 else ("2000", "100000")))
        main(rows, prompt, sys.argv[3:])
