import json
import random

import pytest

from spmd.io.writer import PartWriter, merge, parts_folder, prepare_output


def write_parts(output, dp, rows, seed=0):
    """Rows spread over the parts of dp replicas, in any order; the order in which they were written."""
    prepare_output(output)
    writers = [PartWriter(output, rank) for rank in range(dp)]
    order = list(range(rows))
    random.Random(seed).shuffle(order)
    for row in order:
        writers[row % dp].write(row, json.dumps({"row": row, "text": "é\t\n" * (row % 5)}, ensure_ascii=False))
    for writer in writers:
        writer.close()
    return order


def rows_of(output):
    return [json.loads(line)["row"] for line in open(output, encoding="utf-8")]


@pytest.mark.parametrize("dp", [1, 2, 3])
def test_merge_in_input_order(tmp_path, dp):
    output = str(tmp_path / "out.jsonl")
    write_parts(output, dp, 100)
    assert merge(output, dp) == 100
    assert rows_of(output) == list(range(100))
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("dp", [1, 3])
def test_merge_in_completion_order(tmp_path, dp, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr("time.time_ns", lambda: next(ticks))
    output = str(tmp_path / "out.jsonl")
    order = write_parts(output, dp, 50)
    assert merge(output, dp, "completion") == 50
    assert rows_of(output) == order


def test_a_row_is_seen_as_soon_as_it_is_written(tmp_path):
    output = str(tmp_path / "out.jsonl")
    prepare_output(output)
    writer = PartWriter(output, 0)
    writer.write(7, '{"a": 1}')
    [part] = parts_folder(output).iterdir()
    row, _, key, answer = part.read_text().rstrip("\n").split("\t")
    assert (row, key, answer) == ("7", "-", '{"a": 1}')
    writer.close()


def test_rows_that_are_missing_leave_no_gap_and_no_rows_give_an_empty_file(tmp_path):
    output = str(tmp_path / "out.jsonl")
    prepare_output(output)
    writers = [PartWriter(output, rank) for rank in (0, 1)]
    for row in (9, 4):
        writers[1].write(row, json.dumps({"row": row}))
    for writer in writers:
        writer.close()
    assert merge(output, 2) == 2 and rows_of(output) == [4, 9]
    write_parts(output, 2, 0)
    assert merge(output, 2) == 0 and rows_of(output) == []


def test_a_part_that_is_missing_is_an_error_and_leaves_the_old_output(tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("old")
    write_parts(str(output), 2, 10)
    with pytest.raises(FileNotFoundError, match="part-2"):
        merge(str(output), 3)
    assert output.read_text() == "old"


def test_prepare_makes_folders_and_clears_parts_of_an_earlier_run(tmp_path):
    output = str(tmp_path / "deep" / "er" / "out.jsonl")
    write_parts(output, 3, 10)
    (parts_folder(output) / "notes.txt").write_text("mine")
    write_parts(output, 2, 4, seed=1)
    assert merge(output, 2) == 4 and rows_of(output) == [0, 1, 2, 3]
    assert [path.name for path in parts_folder(output).iterdir()] == ["notes.txt"]


def test_output_through_a_symbolic_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "out.jsonl").write_text("old")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real" / "out.jsonl")
    write_parts(str(tmp_path / "link.jsonl"), 1, 3)
    merge(str(tmp_path / "link.jsonl"), 1)
    assert (tmp_path / "link.jsonl").is_symlink() and rows_of(tmp_path / "real" / "out.jsonl") == [0, 1, 2]


def test_outputs_that_cannot_be_written_fail_before_the_run(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a directory"):
        prepare_output(str(tmp_path))
    with pytest.raises(ValueError, match="is the input"):
        prepare_output(str(tmp_path / "." / "file"), str(tmp_path / "file"))
    with pytest.raises(ValueError, match="no regular file"):
        prepare_output("/dev/null")
    with pytest.raises(ValueError, match="can't be written"):
        prepare_output(str(tmp_path / "file" / "out.jsonl"))
    assert (tmp_path / "file").read_text() == "x"


def test_pitfall_19_answered_rows_are_collected_whole_and_once_and_errors_are_tried_again(tmp_path):
    output = str(tmp_path / "out.jsonl")
    for attempt in range(2):  # the second finds the first one's collection and its own copy of row 0
        assert sorted(prepare_output(output, resume=True)) == ([] if attempt == 0 else [0x10, 0x11])
        writers = [PartWriter(output, rank) for rank in range(3)]
        writers[0].write(0, json.dumps({"row": 5}), 0x10)
        writers[1].write(1, json.dumps({"row": 3}), 0x11 + attempt)
        writers[2].write(2, json.dumps({"row": "failed"}))
        for writer in writers:
            writer.close()
        with open(parts_folder(output) / "part-1.jsonl", "a") as part:
            part.write('8\t1\tff\t{"row": "torn"')
    assert sorted(prepare_output(output, resume=True)) == [0x10, 0x11, 0x12]
    PartWriter(output, 0).close()
    assert merge(output, 1, placed={0x10: 5, 0x12: 3}) == 2  # row 0x11 left the input
    assert rows_of(output) == [3, 5]
    assert prepare_output(output, resume=False) == []
