import io

from spmd.report.progress import Progress, estimate_rows


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_every_half_minute() -> None:
    log = io.StringIO()
    progress = Progress(now=100.0, stream=log)
    for tick in range(1, 7_001):  # 70 s, a hundred ticks a second, ten tokens each
        progress.update(100.0 + tick / 100, tick // 10, 1_000, tick * 10, running=8, waiting=2)
    progress.finish(170.0, 1_000, 70_000)
    assert log.getvalue().splitlines() == [
        "30 s: 300 of 1,000 rows, 1,000 tok/s, running 8, waiting 2",
        "60 s: 600 of 1,000 rows, 1,000 tok/s, running 8, waiting 2",
        "70 s: 1,000 of 1,000 rows, 1,000 tok/s",
    ]


def test_rows_are_a_bare_count_while_their_number_is_unknown() -> None:
    log = io.StringIO()
    Progress(0.0, stream=log).update(30.0, 5, None, 60, running=1, waiting=0)
    assert log.getvalue() == "30 s: 5 rows, 2 tok/s, running 1, waiting 0\n"


def test_a_terminal_gets_a_bar_refreshed_a_few_times_a_second() -> None:
    terminal = Terminal()
    progress = Progress(0.0, stream=terminal)
    for tick in range(1, 1_001):  # one second
        progress.update(tick / 1_000, tick, 2_000, tick * 4, running=8, waiting=2)
    drawn = [part for part in terminal.getvalue().split("\r") if "tok/s" in part]
    assert len(drawn) == 4
    assert "1000/2000" in drawn[-1]
    assert "4,000 tok/s, running 8, waiting 2" in drawn[-1]
    progress.finish(1.0, 2_000, 8_000)
    assert "2000/2000" in terminal.getvalue()
    assert terminal.getvalue().endswith("\n")


def test_disabled_is_silent() -> None:
    terminal = Terminal()
    progress = Progress(0.0, enabled=False, stream=terminal)
    progress.update(100.0, 5, None, 60, running=1, waiting=0)
    progress.finish(100.0, 5, 60)
    assert terminal.getvalue() == ""


def test_rows_are_estimated_from_the_bytes_read() -> None:
    assert estimate_rows(0, 0, 1_000) is None
    assert estimate_rows(10, 250, 1_000) == 40
    assert estimate_rows(40, 1_000, 1_000) == 40
    assert estimate_rows(0, 0, 0) is None
