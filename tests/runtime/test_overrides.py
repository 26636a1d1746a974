"""What the user typed is what runs: keys that are text take it as it stands."""

import sys
from pathlib import Path

import pytest

from spmd.config import Config
from spmd.runtime.compose import compose
from spmd.runtime.overrides import as_typed, quoted
from tests.support.jobs import run_here, write_rows

AS_IT_STANDS = [
    *("20240101_120000", "1e3", "0x10", "007", "true", "NaN", "inf", "-1", "1_000.jsonl"),
    *(
        "résumé.jsonl",
        "輸入.jsonl",
        "a#1",
        "a&b!.jsonl",
        "a=b",
        "a,b",
        "a(1).jsonl",
        "[x]",
        "{a: b}",
        "x~",
        "choice(a,b)",
    ),
    *("it's", "'a'b", "50%", "a;b", "a|b?*<>", "über 'uns' \\", "a b", "int(5)"),
]


def composed(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Config:
    monkeypatch.setattr(sys, "argv", ["spmd", *overrides])
    return compose(quiet=True)


@pytest.mark.parametrize("text", AS_IT_STANDS)
@pytest.mark.parametrize("key", ["run_dir", "model.path"])
def test_keys_that_are_text_take_the_text_as_it_stands(monkeypatch: pytest.MonkeyPatch, key: str, text: str) -> None:
    config = composed(monkeypatch, f"{key}={text}")
    assert (config.run_dir if key == "run_dir" else config.model.path) == text


def test_every_key_that_is_text_and_a_revision_of_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("input=1e1", "output=2e2", "model.tokenizer=3_3", "model.revision=12e4567", "workload.name=4_4")
    config = composed(monkeypatch, *words)
    assert (config.input, config.output, config.model.tokenizer) == ("1e1", "2e2", "3_3")
    assert (config.model.revision, config.workload.name) == ("12e4567", "4_4")


def test_the_input_is_a_text_or_a_list_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    for typed, given in (
        ("[a.jsonl,'b c.jsonl']", ["a.jsonl", "b c.jsonl"]),
        ("[ab].jsonl", "[ab].jsonl"),
        ("shards/**/*-0?.jsonl", "shards/**/*-0?.jsonl"),
        ("-", "-"),
    ):
        assert composed(monkeypatch, f"input={typed}").input == given
    with pytest.raises(ValueError, match="is no text; quote each element"):
        composed(monkeypatch, "input=[1e1,a]")


def test_what_hydra_takes_for_text_stays_as_it_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its quotes, escapes, null and interpolations, which people have in their scripts."""
    monkeypatch.setenv("WHO", "mé")
    words = ["output='a=b'", 'input="a,b"', "run_dir=null", r"model.path=a\,b", "model.tokenizer=${oc.env:WHO}/é"]
    assert as_typed(words)[:4] == words[:4]
    config = composed(monkeypatch, *words)
    assert (config.output, config.input, config.run_dir) == ("a=b", "a,b", None)
    assert (config.model.path, config.model.tokenizer) == ("a,b", "mé/é")


def test_a_home_folder_is_found_where_the_shell_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in model.path=~/x, which to the shell is no assignment."""
    monkeypatch.setenv("HOME", "/home/me")
    assert composed(monkeypatch, "model.path=~/models/a").model.path == "/home/me/models/a"
    assert composed(monkeypatch, "workload.name=~/a").workload.name == "~/a"


def test_other_words_are_left_alone() -> None:
    words = ["topology=pp2", "scheduler.max_num_seqs=1_6", "--cfg", "job", "~balance", "+model.overrides.x=1e3", "x"]
    assert as_typed(words) == words
    assert as_typed(["sampling.stop=[a,1,'1e3']", "sampling.stop=null"]) == [
        "sampling.stop=[a,1,'1e3']",
        "sampling.stop=null",
    ]


@pytest.mark.parametrize("text", [*AS_IT_STANDS, "\\", "a\\'b", "''", "tail\\\\"])
def test_a_quoted_text_is_read_back(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    assert composed(monkeypatch, f"output={quoted(text)}").output == text


def test_a_run_into_a_folder_named_by_the_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "Sätze #1 & 2!.jsonl", [{"prompt": "1+2=", "max_tokens": 2}])
    words = ("input=Sätze #1 & 2!.jsonl", "output=答え.jsonl", "run_dir=20240101_120000", "progress=false")
    assert run_here("model=demo", *words) == 0
    assert (tmp_path / "答え.jsonl").exists() and (tmp_path / "20240101_120000" / "config.yaml").exists()
