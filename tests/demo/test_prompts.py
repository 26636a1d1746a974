import json
from pathlib import Path
from typing import Any

import pytest

from spmd.demo.prompts import answer, right_answer, score, write
from spmd.demo.sums import is_held_out


def reply(row: dict[str, Any], text: str) -> dict[str, Any]:
    chat = "messages" in row["body"]
    choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    body = {"choices": [choice]}
    return {"custom_id": row["custom_id"], "response": {"status_code": 200, "body": body}, "error": None}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    write(tmp_path / "in.jsonl", 10)
    return tmp_path / "in.jsonl"


def test_written_rows_are_held_out_and_of_both_forms(asked: Path) -> None:
    rows = [json.loads(line) for line in asked.read_text().splitlines()]
    assert len({row["custom_id"] for row in rows}) == 10
    assert all(is_held_out(*map(int, row["custom_id"].rstrip("=").split("+"))) for row in rows)
    assert [row["url"] for row in rows[:2]] == ["/v1/completions", "/v1/chat/completions"]
    assert rows[0]["body"]["prompt"] == rows[0]["custom_id"]
    assert rows[1]["body"]["messages"][-1]["content"] == rows[1]["custom_id"]


def test_score_counts_right_answers_in_any_order(asked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in asked.read_text().splitlines()]
    replies = [reply(row, right_answer(row["custom_id"])) for row in reversed(rows)]
    answered = write_lines(asked.with_name("out.jsonl"), replies)
    assert score(asked, answered) == 1
    assert capsys.readouterr().out.endswith("10 of 10 right\n")


def test_wrong_missing_and_failed_rows_count_as_wrong(asked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in asked.read_text().splitlines()]
    replies = [reply(row, right_answer(row["custom_id"])) for row in rows[1:]]
    replies[0]["response"]["body"]["choices"][0] = {"text": "0x"}
    replies[1]["response"] = {"status_code": 400, "body": {}}
    replies[2] = {"custom_id": replies[2]["custom_id"], "response": None, "error": {"message": "bad row"}}
    answered = write_lines(asked.with_name("out.jsonl"), replies)
    assert score(asked, answered) == pytest.approx(0.6)
    assert capsys.readouterr().out.endswith("6 of 10 right\n")


def test_answer_reads_both_forms() -> None:
    bodies: list[dict[str, Any]] = [{"prompt": ""}, {"messages": []}]
    assert [answer(reply({"custom_id": "a", "body": body}, "565")) for body in bodies] == ["565", "565"]
