"""Experts spread over the ranks of a stage: the same logits, each expert in one place, and which splits are refused."""

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from spmd.config import Config, ModelConfig, SchedulerConfig, TopologyConfig
from spmd.model.architecture import SPARSE_MLP, LayerSpec, check_topology, read_architecture
from spmd.model.checkpoint import load
from spmd.model.decoder import Decoder
from spmd.parallel.experts import ExpertParallel
from spmd.parallel.groups import connect
from spmd.schedule.plan import Plan
from spmd.schedule.prompt import Prompt
from spmd.schedule.request import Request, SamplingParams, token_logprobs
from spmd.schedule.scheduler import Scheduler
from spmd.settings import read_model, resolve
from spmd.stage.build import build_stage, load_decoder
from spmd.topology import Topology
from spmd.worker import build_scheduler
from tests.support.checkpoints import write_checkpoint
from tests.support.ranks import Ranks

VOCAB, NUM_BLOCKS, TICKS = 128, 64, 50
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {"num_experts": 8, "mlp_only_layers": [1], "norm_topk_prob": True},
    ),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 8}),
}
Lengths = list[tuple[int, int]]  # prompt and output tokens of each request
REPLICAS: list[Lengths] = [[(23, 4), (9, 16), (40, 12), (5, 9)], [(30, 3)], [(1, 2), (6, 20)], []]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
Logprobs = dict[tuple[int, int], list[float]]  # of the whole vocabulary, by request and position


def checkpoint(folder: Path, family: str, **shape: Any) -> str:
    name, overrides = FAMILIES[family]
    return write_checkpoint(folder, name, **overrides, **shape)


def configured(path: str, dp: int = 1, pp: int = 1, tp: int = 1) -> Config:
    return Config(
        model=ModelConfig(path),
        topology=TopologyConfig(dp, pp, tp, ep=dp * tp > 1),
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16, block_size=4, lookahead=0),
        device="cpu",
    )


def replay(rank: int, config: Config, replicas: list[Lengths]) -> tuple[Logprobs, list[list[int]]]:
    """Run a rank in lockstep with its peers, as the engine does, its tokens fixed beforehand.

    Returns:
        What the leader saw, and the rows that each replica had at each tick.
    """
    t, device = config.topology, torch.device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device := torch.device("cuda", rank))
    topology = Topology(t.dp, t.pp, t.tp, rank)
    groups = connect(topology, device, ep=t.ep)
    settings = resolve(config, read_model(config), device).sized(NUM_BLOCKS)
    decoder = load_decoder(settings, topology, groups, device)
    stage = build_stage(settings, decoder, topology, groups, device)
    scheduler = build_scheduler(settings)
    for index, (prompt_len, max_tokens) in enumerate(replicas[topology.dp_rank]):
        prompt = [token_at(index, position) for position in range(prompt_len)]
        scheduler.add(Request(index, 0, Prompt(prompt), SamplingParams(max_tokens, temperature=0.0, logprobs=VOCAB)))
    found, seen = {}, []
    ring: deque[Plan] = deque()
    for tick in range(TICKS):
        if len(ring) == scheduler.limits.slots:
            commit(scheduler, ring.popleft())
        ring.append(plan := scheduler.schedule(tick))
        rows = [torch.zeros((), dtype=torch.int64) for _ in range(t.dp)]
        if groups.load:
            dist.all_gather(rows, torch.tensor(plan.num_rows), group=groups.load)
        seen.append([int(count) for count in rows])
        sampled = stage.run(plan, max(seen[-1]) if groups.experts else None)
        if sampled:
            _, logprobs = sampled.fetch()
            assert logprobs is not None
            for request, position, each in zip(plan.sampled, plan.sample_positions, logprobs, strict=True):
                assert each is not None
                [likely] = token_logprobs(each, 1)
                found[request.index, position] = [logprob for _, logprob in sorted(likely.top)]
    stage.drain()
    assert not scheduler.num_requests
    return found, seen


def commit(scheduler: Scheduler, plan: Plan) -> None:
    sampled = list(zip(plan.sampled, plan.sample_positions, strict=True))
    tokens = [token_at(request.index, position) for request, position in sampled]
    scheduler.commit(plan, tokens, [position == request.full_length for request, position in sampled])


def token_at(index: int, position: int) -> int:
    return (31 * index + 7 * position * position + position) % VOCAB


@pytest.mark.parametrize(
    ("family", "dp", "pp", "tp"),
    [
        ("qwen3_moe", 1, 1, 2),
        ("qwen3_moe", 2, 1, 1),
        ("qwen3_moe", 4, 1, 1),
        ("qwen3_moe", 2, 2, 1),
        ("qwen3_moe", 2, 1, 2),
        ("mixtral", 2, 1, 1),
        ("mixtral", 2, 1, 2),
    ],
)
def test_logits_are_those_of_the_whole_model(
    ranks: Ranks, tmp_path: Path, family: str, dp: int, pp: int, tp: int
) -> None:
    path = checkpoint(tmp_path, family)
    reports = ranks.run(dp * pp * tp, replay, configured(path, dp, pp, tp), REPLICAS[:dp])
    for replica, members in enumerate(Topology(dp, pp, tp).replicas()):
        expected, _ = replay(0, configured(path), [REPLICAS[replica]])
        found, _ = reports[members[-tp]]
        assert found.keys() == expected.keys()
        for place, logprobs in found.items():
            torch.testing.assert_close(logprobs, expected[place], rtol=1e-4, atol=2e-5)
    ticks = reports[0][1]
    assert all(seen == ticks for _, seen in reports)
    if dp > 1:  # what is to be tested happened: other rows, somebody idle, nobody with anything
        assert len([1 for rows in ticks if len({count for count in rows if count}) > 1]) > 1
        assert len([1 for rows in ticks if max(rows) and not min(rows)]) > 5
        assert not any(ticks[-1])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("enforce_eager", [True, False])
@pytest.mark.parametrize("backend", ["torch", "flashinfer"])
def test_logits_of_two_gpus_are_those_of_one(ranks: Ranks, tmp_path: Path, backend: str, enforce_eager: bool) -> None:
    """In bfloat16, where sums travel rounded: now and then another expert is as good."""
    path = checkpoint(tmp_path, "qwen3_moe", head_dim=64)
    model = ModelConfig(path, dtype="bfloat16", attention_backend=backend, enforce_eager=enforce_eager)
    one, two = (
        replace(config, model=model, device="cuda", scheduler=replace(config.scheduler, block_size=16))
        for config in (configured(path), configured(path, dp=2))
    )
    alone = [replay(0, one, [lengths])[0] for lengths in REPLICAS[:2]]  # compiles what FlashInfer needs
    for expected, (found, _) in zip(alone, ranks.run(2, replay, two, REPLICAS[:2]), strict=True):
        assert found.keys() == expected.keys()
        both = torch.tensor([[found[place], expected[place]] for place in expected])
        apart = (both[:, 0] - both[:, 1]).norm() / (both[:, 1] - both[:, 1].mean(-1, keepdim=True)).norm()
        assert apart < 0.05


def shares(path: str, size: int, load_format: str = "auto") -> list[Decoder]:
    """The decoders of all ranks of one stage."""
    decoders = [Decoder(read_architecture(path), ep=ExpertParallel(rank, size)) for rank in range(size)]
    for decoder in decoders:
        load(decoder, path, load_format)
    return decoders


def experts(decoder: Decoder) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in decoder.state_dict().items() if ".experts." in name}


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_is_held_once(tmp_path: Path, family: str, load_format: str) -> None:
    path = checkpoint(tmp_path, family)
    (whole,), split = shares(path, 1, load_format), shares(path, 4, load_format)
    for name, tensor in whole.state_dict().items():
        parts = [decoder.state_dict()[name] for decoder in split]
        held = torch.cat(parts) if ".experts." in name else parts[2]
        torch.testing.assert_close(held, tensor, rtol=0, atol=0)
    count = sum(tensor.numel() for tensor in experts(whole).values())
    assert [sum(tensor.numel() for tensor in experts(decoder).values()) for decoder in split] == [count // 4] * 4


def test_stacked_experts_are_read_in_part(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "qwen3_moe")
    separate, file = shares(path, 4), tmp_path / "model.safetensors"
    tensors = load_file(file)
    for prefix in [name.partition("0.gate_proj")[0] for name in tensors if ".experts.0.gate_proj." in name]:
        each = {part: [tensors.pop(f"{prefix}{e}.{part}.weight") for e in range(8)] for part in PROJECTIONS}
        gate, up, down = (torch.stack(each[part]) for part in PROJECTIONS)
        tensors |= {f"{prefix}gate_up_proj": torch.cat([gate, up], dim=1), f"{prefix}down_proj": down}
    save_file(tensors, file)
    for stacked, expected in zip(shares(path, 4), separate, strict=True):
        torch.testing.assert_close(stacked.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_only_ones_own_experts_need_to_be_there(tmp_path: Path) -> None:
    path, file = checkpoint(tmp_path, "qwen3_moe"), tmp_path / "model.safetensors"
    arch, tensors = read_architecture(path), load_file(file)
    del tensors["model.layers.2.mlp.experts.5.up_proj.weight"]
    save_file(tensors, file)
    for rank in (0, 1, 3):
        load(Decoder(arch, ep=ExpertParallel(rank, 4)), path)
    with pytest.raises(ValueError, match=r"lacks layers\.2\.mlp\.experts\.5\.up_proj\.weight, which"):
        load(Decoder(arch, ep=ExpertParallel(2, 4)), path)
    save_file(tensors | {"model.layers.2.mlp.experts.8.up_proj.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"holds model\.layers\.2\.mlp\.experts\.8\.up_proj"):
        load(Decoder(arch, ep=ExpertParallel(0, 4)), path)


def test_experts_must_be_there_and_divide_evenly(tmp_path: Path) -> None:
    arch = read_architecture(checkpoint(tmp_path / "sparse", "qwen3_moe"))
    for dp, tp in [(1, 1), (2, 1), (2, 2), (8, 1)]:
        check_topology(arch, Topology(dp, 1, tp), ep=True)
    with pytest.raises(ValueError, match=r"dp=3 x topology\.tp=2 = 6 ranks.*num_experts=8; 1, 2, 4, 8 ranks would fit"):
        check_topology(arch, Topology(3, 1, 2), ep=True)
    odd = replace(arch, moe_intermediate_size=33, layers=(LayerSpec(mlp=SPARSE_MLP),) * 4)  # experts are not cut
    check_topology(odd, Topology(2, 1, 2), ep=True)
    with pytest.raises(ValueError, match="moe_intermediate_size=33"):
        check_topology(odd, Topology(2, 1, 2))
    dense = read_architecture(write_checkpoint(tmp_path / "dense", "Qwen3ForCausalLM"))
    for dp in (1, 2):
        with pytest.raises(ValueError, match=r"topology\.ep=true .* Qwen3ForCausalLM has none; use topology\.ep=false"):
            check_topology(dense, Topology(dp), ep=True)
