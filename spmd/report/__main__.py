"""The report of a run that was started with trace=true.

python -m spmd.report RUN_DIR [--ticks A:B]

It writes into RUN_DIR: report.html, a page that needs nothing else; trace.json.gz for https://ui.perfetto.dev, of ticks
A to B - 1 if they are given; and pictures/ as PNG and SVG, where matplotlib is installed. It works while the run goes
on and after it was killed.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spmd.messages import cannot_write
from spmd.report import page, perfetto, pictures
from spmd.report.parts import cut
from spmd.report.summary import FIGURES
from spmd.signals import USAGE
from spmd.trace.timeline import read


def report(run_dir: Path, ticks: tuple[int, int] | None = None) -> list[str]:
    """Write it all, and return what there is to tell.

    Raises:
        ValueError: there is no trace, or nothing can be written.
    """
    traces, figures = read(run_dir / "trace"), _figures(run_dir / "trace" / FIGURES)
    window = perfetto.window(traces, ticks)
    end = max(int(lane.ends[-1]) for trace in traces for lane in perfetto.lanes(trace).values())
    cuts = [cut(trace, end) for trace in traces]
    try:
        page.write(traces, cuts, end, figures, run_dir / "report.html")
        perfetto.write(traces, window, run_dir / "trace.json.gz")
        drawn = pictures.draw(traces, cuts, end, figures, run_dir / "pictures")
    except OSError as error:
        raise ValueError(cannot_write(f"the report in {run_dir}", run_dir, error)) from error
    first, last = window
    return [
        *page.notes(traces, end, figures),
        f"page: {run_dir / 'report.html'}",
        f"Perfetto: {run_dir / 'trace.json.gz'} (ticks {first:,} to {last - 1:,}; --ticks A:B takes others)",
        f"pictures: {drawn}",
    ]


def _figures(file: Path) -> dict[str, Any] | None:
    """None: a run that isn't over, or not in order, has left none."""
    if not file.exists():
        return None
    figures: dict[str, Any] = json.loads(file.read_text())
    return figures


def _ticks(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch(r"(\d+):(\d+)", text)) or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} must be A:B with 0 <= A < B, as in 100:200")
    return int(found[1]), int(found[2])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m spmd.report", description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run_dir of a run that had trace=true")
    parser.add_argument("--ticks", type=_ticks, metavar="A:B", help="of the trace for Perfetto: A to B - 1")
    asked = parser.parse_args(arguments)
    try:
        print("\n".join(report(asked.run_dir, asked.ticks)))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(USAGE)


if __name__ == "__main__":
    main()
