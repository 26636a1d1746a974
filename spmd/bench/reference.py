"""The workload with transformers' own `generate`: static batches, left padding, a batch ends with its longest row.

python -m spmd.bench.reference model=small workload=cpu scheduler.max_num_seqs=16

Runs on the CPU, with the bench's configuration: batches have `scheduler.max_num_seqs` rows. Only the tokens a row
asked for count.
"""

import json
from time import perf_counter
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from spmd.bench.workload import prompts
from spmd.config import Config
from spmd.runtime.main import main
from spmd.settings import read_model
from spmd.signals import Stop
from spmd.topology import Topology

Rows = list[tuple[list[int], int]]


def reference(config: Config, topology: Topology, stop: Stop) -> None:
    """Run the workload on random weights of the model's shape and print one line of JSON."""
    arch = read_model(config)
    shape = AutoConfig.from_pretrained(config.model.path, revision=config.model.revision, **config.model.overrides)
    model = AutoModelForCausalLM.from_config(shape, dtype=arch.dtype).eval()
    rows = list(prompts(config.workload, arch.vocab_size))
    size = config.scheduler.max_num_seqs
    _generate(model, [(prompt[:8], 2) for prompt, _ in rows[:size]])
    started = perf_counter()
    for first in range(0, len(rows), size):
        _generate(model, rows[first : first + size])
    seconds = perf_counter() - started
    print(json.dumps({"duration": seconds, "output_throughput": sum(output for _, output in rows) / seconds}))


@torch.inference_mode()
def _generate(model: Any, rows: Rows) -> None:
    longest, new = max(len(prompt) for prompt, _ in rows), max(output for _, output in rows)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt, _ in rows])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in rows])
    model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)


if __name__ == "__main__":
    main(reference)
