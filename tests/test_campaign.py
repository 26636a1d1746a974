"""The campaign of faults, cut short: one run that loses a rank to SIGKILL and one that is told to stop."""

from pathlib import Path

from tests.campaign import campaign


def test_killed_and_stopped_runs_are_resumed_to_every_row_once(tmp_path: Path) -> None:
    tally = campaign(tmp_path, runs=2, seed=1, usual="pp2")
    assert (tally.runs, tally.left) == (2, 0)
    assert {hit.split()[0] for hit in tally.hits} == {"SIGKILL", "SIGUSR1"}
    assert tally.moved, "none went on with another topology"
