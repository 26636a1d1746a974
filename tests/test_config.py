"""The schema as Hydra enforces it, and each rule of `check` by its message."""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from spmd.config import Config, keys, value_of
from spmd.config_checks import check, decode_rows, warnings
from spmd.runtime.compose import CONF, from_hydra, register_schema

CHOICES = {name: member.metadata["choices"] for name, member in keys().items() if member.metadata["choices"]}
AT_LEAST = {name: least for name, member in keys().items() if (least := member.metadata["least"]) is not None}


def composed(*overrides: str) -> Config:
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return from_hydra(compose("config", list(overrides)))


def altered(changes: dict[str, Any]) -> Config:
    """The default configuration but for `changes`, whose keys are dotted."""
    config = Config()
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        if section:
            name, value = section, replace(getattr(config, section), **{name: value})
        config = replace(config, **{name: value})
    return config


def test_files_without_overrides_give_the_defaults() -> None:
    assert composed() == Config()


@pytest.mark.parametrize("path", sorted((CONF / "topology").glob("*.yaml")), ids=lambda path: path.stem)
def test_topology_groups_are_what_their_names_say(path: Path) -> None:
    t = composed(f"topology={path.stem}").topology
    sizes = {"dp": t.dp, "pp": t.pp, "tp": t.tp}
    name = "".join(f"{axis}{sizes[axis]}" for axis in ("pp", "dp", "tp") if sizes[axis] > 1)
    assert path.stem == (name or "single")


@pytest.mark.parametrize("group", ["model", "sampling", "scheduler", "balance", "workload"])
def test_every_group_composes_into_a_valid_configuration(group: str) -> None:
    for path in (CONF / group).glob("*.yaml"):
        config = composed(f"{group}={path.stem}")
        check(config, 1)


def test_overrides_reach_the_frozen_configuration() -> None:
    config = composed(
        "topology=pp2",
        "topology.layers=[3,4]",
        "scheduler.decode_buckets=[1,2]",
        "sampling.stop=[a,b]",
        "model.path=x",
        "+model.overrides.num_hidden_layers=7",
        "profile.ticks=[10,20]",
        "bench.bandwidth=4.24e12",
    )
    assert (config.profile.ticks, config.bench.bandwidth, config.bench.flops) == ([10, 20], 4.24e12, None)
    assert (config.topology.pp, config.topology.layers, config.scheduler.decode_buckets) == (2, [3, 4], [1, 2])
    assert (config.sampling.stop, config.model.overrides) == (["a", "b"], {"num_hidden_layers": 7})
    with pytest.raises(AttributeError):
        config.output = "elsewhere"  # type: ignore[misc]


@pytest.mark.parametrize(
    "override",
    [
        "sheduler.max_num_seqs=4",
        "scheduler.max_seqs=4",
        "scheduler.max_num_seqs=many",
        "scheduler.max_num_seqs=1.5",
        "scheduler.prefix_caching=perhaps",
        "topology.layers=7",
        "topology.layers=[a]",
        "sampling.temperature=hot",
        "topology=pp99",
    ],
)
def test_unknown_keys_and_wrong_types_are_errors(override: str) -> None:
    with pytest.raises(HydraException) as error:
        composed(override)
    assert override.lstrip("+").split("=")[0].split(".")[0] in str(error.value)


@pytest.mark.parametrize(("override", "name"), [("+scheduler.max_seqs=4", "max_seqs"), ("+inptu=x", "inptu")])
def test_unknown_keys_are_errors_with_a_plus_too(override: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown key '{name}', added with \\+"):
        composed(override)


def test_the_default_configuration_is_valid_and_gives_no_warning() -> None:
    check(Config(), 1)
    assert warnings(Config()) == []


@pytest.mark.parametrize("key", CHOICES)
def test_a_choice_is_one_of_the_known(key: str) -> None:
    with pytest.raises(ValueError) as error:
        check(altered({key: "other"}), 1)
    assert str(error.value) == f"{key}=other is not one of {', '.join(CHOICES[key])}"


@pytest.mark.parametrize("key", AT_LEAST)
def test_a_number_is_large_enough(key: str) -> None:
    low = AT_LEAST[key] - 1
    with pytest.raises(ValueError) as error:
        check(altered({key: low}), 1)
    assert str(error.value) == f"{key}={low} must be at least {AT_LEAST[key]}"


@pytest.mark.parametrize(
    ("changes", "world_size", "parts"),
    [
        (
            {"topology.dp": 2, "topology.pp": 3, "topology.tp": 4},
            8,
            ("topology.dp=2", "topology.pp=3", "topology.tp=4", "24 processes", "started 8"),
        ),
        ({"topology.pp": 4, "scheduler.max_num_seqs": 3}, 4, ("max_num_seqs=3", "topology.pp=4", ">= 4")),
        ({"scheduler.gpu_memory_utilization": 0.0}, 1, ("gpu_memory_utilization=0.0", "(0, 1]")),
        ({"scheduler.gpu_memory_utilization": 1.1}, 1, ("gpu_memory_utilization=1.1", "(0, 1]")),
        (
            {"topology.pp": 2, "scheduler.max_num_seqs": 17, "scheduler.decode_buckets": [4, 9]},
            2,
            ("decode_buckets=[4, 9]", "between 1 and 8", "max_num_seqs 17 // pp 2"),
        ),
        ({"profile.ticks": [3, 3]}, 1, ("profile.ticks=[3, 3]", "0 <= a < b")),
        ({"profile.ticks": [-1, 3]}, 1, ("profile.ticks=[-1, 3]", "0 <= a < b")),
        ({"profile.ticks": [3]}, 1, ("profile.ticks=[3]", "two numbers")),
        ({"workload.input_len": [9, 5]}, 1, ("workload.input_len=[9, 5]", "1 <= a <= b")),
        ({"workload.output_len": [0, 5]}, 1, ("workload.output_len=[0, 5]", "two numbers")),
        ({"scheduler.decode_buckets": [0]}, 1, ("decode_buckets=[0]", "between 1 and 128")),
        (
            {"topology.pp": 2, "scheduler.max_num_seqs": 64, "scheduler.max_num_batched_tokens": 31},
            2,
            ("max_num_batched_tokens=31", "32 rows", "max_num_seqs 64 // pp 2", "at least 32"),
        ),
        (
            {"topology.dp": 2, "balance.gate": "near", "scheduler.max_num_seqs": 1},
            2,
            ("balance.gate=near", "max_num_seqs=1", ">= 2"),
        ),
        (
            {"scheduler.max_num_batched_tokens": 100, "scheduler.decode_cap": False, "topology.pp": 2},
            2,
            ("max_num_batched_tokens=100", "128 rows"),
        ),
    ],
)
def test_a_broken_rule_is_told_with_its_numbers(changes: dict[str, Any], world_size: int, parts: tuple[str]) -> None:
    with pytest.raises(ValueError) as error:
        check(altered(changes), world_size)
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_seats_that_can_never_be_used_at_once_are_a_warning() -> None:
    odd = {"topology.pp": 2, "scheduler.max_num_seqs": 17}
    (warning,) = warnings(altered(odd))
    assert "max_num_seqs=17" in warning and "16 or 18" in warning
    assert warnings(altered(odd | {"scheduler.async_depth": 1})) == []
    assert warnings(altered(odd | {"scheduler.decode_cap": False})) == []
    assert warnings(altered(odd | {"scheduler.max_num_seqs": 16})) == []


def test_a_gate_with_one_replica_is_a_warning() -> None:
    (warning,) = warnings(altered({"balance.gate": "saturated"}))
    assert "balance.gate=saturated" in warning and "topology.dp=1" in warning
    assert warnings(altered({"balance.gate": "saturated", "topology.dp": 2})) == []


def test_decode_rows_are_an_equal_share_of_the_seats() -> None:
    sizes = {"topology.pp": 4, "scheduler.max_num_seqs": 10}
    assert decode_rows(altered(sizes)) == 2
    assert decode_rows(altered(sizes | {"scheduler.decode_cap": False})) == 10


def test_every_key_says_what_it_does_and_keeps_to_its_own_rules() -> None:
    config = Config()
    for name, member in keys().items():
        assert member.metadata["help"].endswith("."), name
        value, choices, least = value_of(config, name), member.metadata["choices"], member.metadata["least"]
        assert not choices or value is None or value in choices, name
        assert least is None or value is None or value >= least, name


def test_keys_are_those_that_hydra_knows() -> None:
    sections = {f.name: getattr(Config(), f.name) for f in fields(Config)}
    nested = {f"{name}.{f.name}" for name, value in sections.items() if is_dataclass(value) for f in fields(value)}
    assert keys().keys() == nested | {name for name, value in sections.items() if not is_dataclass(value)}
