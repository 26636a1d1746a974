"""What the documentation says is so: examples run, files that it names are there, and pages can be read on a screen."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spmd.runtime.configuration_page import page
from tests.support.jobs import ROOT, read_rows, run_here

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WIDEST, LONGEST_README = 120, 160
BLOCKS = [
    pytest.param(block, id=f"{path.stem} {number}")
    for path in PAGES
    for number, block in enumerate(re.findall(r"^```bash run\n(.*?)^```", path.read_text(), re.M | re.S))
]


def blocks(path: Path, info: str) -> list[str]:
    return re.findall(rf"^```{info}\n(.*?)^```", path.read_text(), re.M | re.S)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_are_no_wider_than_a_screen_and_their_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    assert not [line for line in text.splitlines() if len(line) > WIDEST]
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (path.parent / link).exists(), link


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= LONGEST_README


def test_every_file_that_the_pages_name_is_there() -> None:
    for path in PAGES:
        for name in re.findall(r"`((?:spmd|launch|conf|tests)/[\w./]+)`", path.read_text()):
            assert (ROOT / name).exists(), f"{path.name}: {name}"


def test_every_function_on_a_row_s_way_is_where_the_architecture_page_says() -> None:
    """A step names a file and what of it is used there: (`file.py`, `Class.method`), or `file.py` (`function`)."""
    found = re.findall(
        r"`([\w/]+\.py)`(?:, |,\n +| \()((?:`[\w.]+`(?:,\s+)?)+)\)", (ROOT / "docs" / "architecture.md").read_text()
    )
    assert len(found) > 15, found
    for file, names in found:
        source = (ROOT / "spmd" / file).read_text()
        for name in re.findall(r"`([\w.]+)`", names):
            for part in name.split("."):
                assert re.search(rf"\b(def|class) {part}\b|^{part}\b", source, re.M), f"{file} has no {name}"


def test_the_page_of_keys_is_made_from_the_schema() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == page(), "run make docs"


@pytest.mark.parametrize("block", BLOCKS)
def test_examples_run(block: str, tmp_path: Path) -> None:
    """In a folder that looks like the repository, so that nothing is left in it."""
    for name in ("launch", "conf", "spmd"):
        (tmp_path / name).symlink_to(ROOT / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-euc", block], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_example_rows_are_answered_or_refused_as_the_page_says(tmp_path: Path) -> None:
    (rows,) = blocks(ROOT / "docs" / "batch-files.md", "jsonl rows")
    (tmp_path / "in.jsonl").write_text(rows)
    output = tmp_path / "out.jsonl"
    assert (
        run_here("model=demo", "device=cpu", f"input={tmp_path}/in.jsonl", f"output={output}", f"run_dir={tmp_path}")
        == 0
    )
    failed = [row["error"] is not None for row in read_rows(output)]
    assert failed == [False] * 5 + [True] * 5
    assert json.loads((tmp_path / "out.summary.json").read_text())["completed"] == 5
