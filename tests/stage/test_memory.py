"""What a stage is said to need, against what its ranks allocate; and what is refused, with advice that helps."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spmd.backend.kv_cache import KVCache
from spmd.config import Config, ModelConfig, SchedulerConfig, TopologyConfig
from spmd.messages import readable
from spmd.model.architecture import read_architecture
from spmd.parallel.groups import Groups, connect
from spmd.runtime.compose import CONF
from spmd.settings import Settings, read_model, resolve
from spmd.stage import build, memory
from spmd.stage.build import load_decoder
from spmd.stage.memory import (
    Device,
    blocks_that_fit,
    check_memory,
    least_blocks,
    machine_bytes,
    most_blocks,
    needs,
    smallest_of_stages,
    this_device,
)
from spmd.topology import Topology
from tests.support.checkpoints import write_checkpoint
from tests.support.jobs import run_here
from tests.support.ranks import Ranks
from tests.support.settings import settled

CPU = torch.device("cpu")
GIB = 2**30
EIGHT_B = read_architecture(str(CONF / "shapes" / "qwen3_8b"))


def configured(dp: int = 1, pp: int = 1, tp: int = 1, ep: bool = False, path: str | None = None) -> Config:
    return Config(ModelConfig(path, load_format="dummy"), TopologyConfig(dp, pp, tp, ep=ep))


def gpu(gib: float, used: float = 0.0, place: str = "") -> Device:
    return Device("cuda", int(gib * GIB), int(used * GIB), place)


def eight_b(config: Config, kind: str = "cuda") -> Settings:
    return settled(config, EIGHT_B, kind)


def refused(config: Config, *devices: Device) -> str:
    with pytest.raises(ValueError, match="each rank of stage") as raised:
        check_memory(eight_b(config), devices)
    return str(raised.value)


@pytest.mark.parametrize(
    ("family", "splits"),
    [
        ("Qwen2ForCausalLM", [(1, 1, 1, False), (1, 2, 1, False), (1, 1, 2, False), (2, 2, 2, False)]),
        ("Qwen3MoeForCausalLM", [(1, 2, 2, False), (1, 1, 2, True), (2, 2, 1, True), (2, 1, 2, True)]),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_that_loading_allocates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, splits: list[tuple[int, int, int, bool]], tied: bool
) -> None:
    monkeypatch.setattr("spmd.model.decoder.Decoder.pack", lambda decoder, rows: None)  # which hides what it reorders
    path = write_checkpoint(tmp_path, family, vocab_size=129, tie_word_embeddings=tied)
    for dp, pp, tp, ep in splits:
        config = configured(dp, pp, tp, ep, path)
        for rank in range(dp * pp * tp):
            topology = Topology(dp, pp, tp, rank)
            settings = resolve(config, read_model(config), CPU)
            decoder = load_decoder(settings, topology, Groups(), CPU)
            storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in decoder.parameters()}
            needed = needs(settings)[topology.pp_rank]
            assert needed.weights == sum(storages.values())
            assert needed.layers == decoder.range == settings.stages[topology.pp_rank]
            cache = KVCache([settings.arch.cache_spec(layer, tp) for layer in decoder.range], 7, 16)
            assert 7 * needed.block == cache.keys.nbytes + cache.values.nbytes


def test_the_whole_sum_is_told_and_every_advice_helps() -> None:
    config = configured(pp=2)
    told = refused(config, *[gpu(11, used=0.5, place="rank 3 on node2")] * 2)
    assert told.startswith(
        "each rank of stage 0 (layers 0-18) needs 11.0 GiB: weights 8.0 GiB, the KV cache of one request of 40960 "
        "tokens 3.0 GiB, beside activations of about 2."
    )
    assert "the smallest GPU (rank 3 on node2) has 11.0 GiB, 512.0 MiB of it taken, and " in told
    assert "scheduler.gpu_memory_utilization=0.9 leaves 9.4 GiB; use topology.pp=4 or topology.tp=2 or " in told
    for total, used, wanted in ((11, 0.5, 3), (12.2, 0.5, 4), (8, 0.5, 2)):
        devices = [gpu(total, used)] * 2
        advice = re.findall(r"(\w+)\.(\w+)=([\d.]+)(?= or |$)", refused(config, *devices).rpartition("use ")[2])
        assert len(advice) == wanted, advice
        for section, key, value in advice:
            number = float(value) if "." in value else int(value)
            changed = replace(config, **{section: replace(getattr(config, section), **{key: number})})
            check_memory(eight_b(changed), devices[:1] * changed.topology.pp)


def test_where_nothing_helps() -> None:
    assert refused(configured(), gpu(1)).endswith("use more stages and tensor ranks, or larger GPUs")


def test_each_stage_has_a_device_of_its_own() -> None:
    """Stages split by hand may fit GPUs that are not alike."""
    config = replace(configured(), topology=TopologyConfig(pp=2, layers=[26, 10]))
    check_memory(eight_b(config), [gpu(24), gpu(12)])
    assert "each rank of stage 0 (layers 0-25)" in refused(config, gpu(12), gpu(24))


def test_blocks_that_are_asked_for_must_fit() -> None:
    config = replace(configured(), scheduler=SchedulerConfig(num_blocks=1000))
    assert least_blocks(eight_b(config)) == most_blocks(eight_b(config)) == 1000
    check_memory(eight_b(config), [gpu(40)])
    told = refused(config, gpu(24))
    assert "the KV cache of scheduler.num_blocks=1000 blocks 8.8 GiB" in told
    assert re.search(r"or scheduler\.num_blocks=\d+$", told)


def test_blocks_that_fit_are_those_of_the_fullest_stage() -> None:
    config = replace(configured(pp=2), scheduler=SchedulerConfig(gpu_memory_utilization=0.5))
    each = needs(eight_b(config))
    fit = blocks_that_fit(eight_b(config), [gpu(40), gpu(80)])
    assert fit == (20 * GIB - each[0].weights) // each[0].block
    assert blocks_that_fit(eight_b(config), [gpu(4000), gpu(4000)]) == 1 + 128 * math.ceil(40960 / 64)
    on_cpus = eight_b(config, "cpu")
    assert blocks_that_fit(on_cpus, [Device("cpu", GIB)] * 2) == 4 * GIB // needs(on_cpus)[0].block


def test_activations_are_only_warned_of() -> None:
    assert check_memory(eight_b(configured()), [gpu(80)]) == []
    [told] = check_memory(eight_b(configured(pp=2)), [gpu(16)] * 2)
    assert re.match(r"activations on stage 0 .* may take 2\.\d GiB \(an estimate\), where weights and KV cache", told)
    share = float(re.findall(r"gpu_memory_utilization=([\d.]+)", told)[0])
    config = replace(configured(pp=2), scheduler=SchedulerConfig(gpu_memory_utilization=share))
    assert check_memory(eight_b(config), [gpu(16)] * 2) == []


def test_a_machine_that_cannot_hold_the_weights_is_refused() -> None:
    on_cpus = eight_b(configured(pp=2), "cpu")
    assert check_memory(on_cpus, [Device("cpu", 9 * GIB)] * 2) == []
    told = "the weights of a rank take 7.6 GiB in the mean, its share of its machine's memory is 7.0 GiB; use more mach"
    with pytest.raises(ValueError, match=told):
        check_memory(on_cpus, [Device("cpu", 7 * GIB)] * 2)
    [warning] = check_memory(on_cpus, [Device("cpu", 9 * GIB), Device("cpu", 7 * GIB)])  # which ranks share which?
    assert warning.startswith(told)
    assert this_device(CPU, ranks=4).total == machine_bytes() // 4 > 2**24


def test_a_cache_that_was_asked_for_counts_on_cpus_too() -> None:
    config = replace(configured(), scheduler=SchedulerConfig(num_blocks=20_000))
    told = r"take 15.3 GiB and the KV cache of scheduler.num_blocks=20000 blocks 43.9 GiB in the mean, .* use fewer blo"
    with pytest.raises(ValueError, match=told):
        check_memory(eight_b(config, "cpu"), [Device("cpu", 32 * GIB)])
    assert check_memory(eight_b(config, "cpu"), [Device("cpu", 64 * GIB)]) == []


def test_a_run_whose_weights_the_machine_cannot_hold_ends_before_they_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "machine_bytes", lambda: 2**20)
    monkeypatch.setattr(build, "load", None)  # loading would end in a TypeError
    (tmp_path / "in.jsonl").write_text('{"prompt": "1+2="}\n')
    files = (f"input={tmp_path}/in.jsonl", f"output={tmp_path}/out.jsonl", f"run_dir={tmp_path}/run")
    assert run_here("model=demo", *files) == 2
    assert capfd.readouterr().err.startswith("error: the weights of a rank take ")


@pytest.mark.parametrize(
    ("lines", "file", "limit"),
    [
        ("0::/", "memory.max", "1048576\n"),
        ("0::/slurm/job_7/step_0", "slurm/job_7/memory.max", "1048576\n"),
        ("5:cpu,memory:/slurm/job_7\n4:pids:/", "memory/slurm/job_7/memory.limit_in_bytes", "1048576"),
    ],
    ids=["container", "a job's, above its step's", "version 1"],
)
def test_the_limit_of_a_job_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, file: str, limit: str
) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(limit)
    (tmp_path / "own").write_text(lines)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    assert machine_bytes() == 2**20
    (tmp_path / file).write_text("max\n")
    assert machine_bytes() > 2**24


def gathered(rank: int, config: Config, devices: list[Device]) -> list[Device]:
    t = config.topology
    topology = Topology(t.dp, t.pp, t.tp, rank)
    connect(topology, CPU)
    return smallest_of_stages(devices[rank], eight_b(config), topology)


def test_the_smallest_device_of_each_stage_is_found(ranks: Ranks) -> None:
    """A GPU that others use is as good as a small one."""
    devices = [gpu(16), gpu(80, used=70), gpu(80), gpu(40, used=1)]
    found = ranks.run(4, gathered, configured(dp=2, pp=2), devices)
    assert found == [[devices[0], devices[1]]] * 4
    assert smallest_of_stages(devices[0], eight_b(configured()), Topology()) == devices[:1]


def test_bytes_for_people() -> None:
    assert [readable(count) for count in (0, 3 * 2**18, 5 * GIB // 2)] == ["0.0 MiB", "0.8 MiB", "2.5 GiB"]


def test_shared_experts_weigh_less() -> None:
    arch = read_architecture(str(CONF / "shapes" / "qwen3_30b_a3b"))
    apart, shared = (needs(settled(configured(dp=4, ep=ep), arch, "cuda"))[0].weights for ep in (False, True))
    assert apart > 50 * GIB and shared < apart / 3


def test_shared_experts_need_room_for_each_others_rows() -> None:
    arch = read_architecture(str(CONF / "shapes" / "qwen3_30b_a3b"))
    half = replace(arch, dtype=torch.float16)  # not by kernels, so through NCCL
    both = (settled(configured(dp=2, ep=True), each, "cuda") for each in (arch, half))
    with_room, without = (needs(settings)[0].weights for settings in both)
    rows, words = 2 * 8192 * (2048 + 2 * 8 + 2048) * 2, 256 * 1024 * 8
    assert 0 <= with_room - without - rows - words < 1024
