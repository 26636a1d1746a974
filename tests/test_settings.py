"""What null keys come to: on GPUs, on CPUs, in pipelines; and that the record of a run is a configuration again."""

from dataclasses import fields, replace

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from spmd.config import BalanceConfig, Config, ModelConfig, SamplingConfig, SchedulerConfig, TopologyConfig
from spmd.model.architecture import read_architecture
from spmd.runtime.compose import CONF, register_schema
from spmd.settings import worked_out
from tests.support.settings import settled

EIGHT_B = read_architecture(str(CONF / "shapes" / "qwen3_8b"))
TINY = read_architecture(str(CONF / "shapes" / "tiny"))  # float32, which FlashInfer doesn't compute


def test_row_counts_of_a_gpu() -> None:
    """By eights, then in steps of at most a quarter; a CPU pads nothing but to the whole batch."""
    config = Config(scheduler=SchedulerConfig(max_num_seqs=256))
    counts = sorted(settled(config, EIGHT_B, "cuda").scheduler.decode_buckets)
    assert counts == [8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256]
    assert settled(config, EIGHT_B).scheduler.decode_buckets == [256]


def test_plans_with_prompts_are_padded_for_graphs_where_launches_take_longer_than_kernels() -> None:
    """A layer of Qwen3-8B has 193 million parameters, one of Qwen3-0.6B 16 million."""
    small = read_architecture(str(CONF / "shapes" / "qwen3_06b"))
    assert settled(Config(), EIGHT_B, "cuda").scheduler.mixed_buckets == [768, 640, 512, 448, 384, 320, 256]
    counts = settled(Config(), small, "cuda").scheduler.mixed_buckets
    assert (counts[0], counts[-1], len(counts)) == (8192, 256, 21)
    without = [Config(model=ModelConfig(enforce_eager=True)), Config(topology=TopologyConfig(tp=2))]
    experts = read_architecture(str(CONF / "shapes" / "qwen3_30b_a3b"))
    cases = [(Config(), EIGHT_B, "cpu"), (Config(), experts, "cuda"), *((each, small, "cuda") for each in without)]
    assert not any(settled(*case).scheduler.mixed_buckets for case in cases)


@pytest.mark.parametrize(("dp", "ep", "gate"), [(1, False, "off"), (2, False, "off"), (2, True, "saturated")])
def test_replicas_that_share_experts_are_gated(dp: int, ep: bool, gate: str) -> None:
    experts = read_architecture(str(CONF / "shapes" / "qwen3_30b_a3b"))
    config = Config(topology=TopologyConfig(dp=dp, ep=ep))
    assert settled(config, experts, "cuda").balance.gate == gate
    asked = replace(config, balance=BalanceConfig(gate="off"))
    assert settled(asked, experts, "cuda").balance.gate == "off"


def test_a_plan_can_be_padded_to_no_more_than_it_may_have() -> None:
    asked = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, mixed_buckets=[32, 65])
    with pytest.raises(ValueError, match=r"mixed_buckets=\[32, 65\] must lie between 1 and max_num_batched_tokens=64"):
        settled(Config(scheduler=asked), EIGHT_B)


@pytest.mark.parametrize(
    ("kind", "pp", "expected"),
    [
        ("cpu", 1, {"max_num_batched_tokens": 2048, "block_size": 16, "lookahead": 0, "prefill_spread": 0}),
        ("cpu", 2, {"prefill_min": 1, "lookahead": 1, "prefill_spread": 8, "decode_buckets": [64]}),
        ("cuda", 1, {"max_num_batched_tokens": 8192, "block_size": 64, "lookahead": 1, "prefill_min": 512}),
    ],
)
def test_nulls_of_the_scheduler_depend_on_device_and_pipeline(kind: str, pp: int, expected: dict[str, object]) -> None:
    scheduler = settled(Config(topology=TopologyConfig(pp=pp)), EIGHT_B, kind).scheduler
    assert {name: getattr(scheduler, name) for name in expected} == expected


def test_defaults_of_a_backend_are_not_those_of_a_device() -> None:
    plain = settled(Config(model=ModelConfig(attention_backend="torch")), EIGHT_B, "cuda")
    assert (plain.model.attention_backend, plain.scheduler.block_size) == ("torch", 16)
    assert settled(Config(), EIGHT_B, "cuda").model.attention_backend == "flashinfer"
    assert settled(Config(), TINY, "cuda").model.attention_backend == "torch"


def test_what_was_asked_for_stays() -> None:
    asked = SchedulerConfig(
        8, 99, 32, 7, lookahead=0, prefill_spread=3, prefill_min=5, long_prefill_token_threshold=0, decode_buckets=[2],
        mixed_buckets=[7],
    )  # fmt: skip
    scheduler = settled(Config(scheduler=asked), EIGHT_B, "cuda").scheduler
    assert vars(scheduler) == vars(asked) | {"decode_buckets": [8, 2]}


def test_layers_are_split_by_cost_or_as_asked() -> None:
    assert settled(Config(topology=TopologyConfig(pp=2)), EIGHT_B, "cuda").topology.layers == [19, 17]
    settings = settled(Config(topology=TopologyConfig(pp=2, layers=[20, 16])), EIGHT_B, "cuda")
    assert settings.stages == [range(20), range(20, 36)]


def test_another_topology_is_worked_out_anew() -> None:
    settings = settled(Config(topology=TopologyConfig(pp=2)), EIGHT_B, "cuda")
    wider = settings.with_topology(pp=4)
    assert (wider.decode_rows, wider.scheduler.prefill_spread, len(wider.stages)) == (32, 16, 4)


def test_sampling_is_what_rows_get_that_say_nothing() -> None:
    settings = settled(Config(sampling=SamplingConfig(top_p=0.5, stop=["x"])), TINY)
    assert settings.default_sampling["top_p"] == 0.5
    assert settings.as_config()["sampling"] | {"temperature": 1.0, "n": 1} == settings.as_config()["sampling"]


def test_the_record_of_a_run_is_a_configuration_that_comes_to_the_same() -> None:
    """Every key is there with its value, and none of those that were worked out is null."""
    settings = settled(Config(topology=TopologyConfig(pp=2)), EIGHT_B, "cuda", num_blocks=100)
    record = OmegaConf.to_yaml(OmegaConf.create(settings.as_config()))
    register_schema()
    schema = ConfigStore.instance().load("schema.yaml").node
    again = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.create(record)))
    assert isinstance(again, Config)
    repeated = settled(again, EIGHT_B, "cuda")
    assert all(getattr(repeated, f.name) == getattr(settings, f.name) for f in fields(Config) if f.name != "sampling")
    scheduler = settings.as_config()["scheduler"]
    assert None not in scheduler.values() and scheduler["num_blocks"] == 100


def test_the_log_names_what_was_worked_out_and_nothing_else() -> None:
    settings = settled(replace(Config(), scheduler=SchedulerConfig(block_size=32)), TINY)
    message = worked_out(settings)
    assert "scheduler.max_num_batched_tokens=2048" in message and "model.max_model_len=" in message
    assert "block_size" not in message and "max_num_seqs" not in message
