"""Several watches as one."""

from spmd.report.profile import all_of


def test_those_given_are_called_in_order() -> None:
    seen: list[tuple[str, object]] = []
    engine = object()
    first, second = (lambda engine, name=name: seen.append((name, engine)) for name in ("first", "second"))
    watch = all_of(None, first, None, second)
    assert watch is not None
    watch(engine)
    assert seen == [("first", engine), ("second", engine)]


def test_one_is_itself_and_none_is_none() -> None:
    assert all_of(None, print) is print
    assert all_of(None, None) is all_of() is None
