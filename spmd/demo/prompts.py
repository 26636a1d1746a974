"""Writes held-out sums as a batch file and counts the right answers in the engine's output file.

    python -m spmd.demo.prompts write in.jsonl [--count 500]
    python -m spmd.demo.prompts score in.jsonl out.jsonl

Rows take the completions and the chat form in turn; the `custom_id` of a row is its prompt.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from spmd.demo.sums import held_out, prompt

PASS = 0.99  # share of right answers that a sound engine reaches


def batch_row(index: int, a: int, b: int) -> dict[str, Any]:
    """A request line of the OpenAI batch format."""
    text = prompt(a, b)
    row: dict[str, Any] = {"custom_id": text, "method": "POST"}
    if index % 2 == 0:
        return row | {"url": "/v1/completions", "body": {"prompt": text}}
    return row | {"url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": text}]}}


def write(path: Path, count: int) -> None:
    rows = [batch_row(i, a, b) for i, (a, b) in enumerate(held_out()[:count])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answer(row: dict[str, Any]) -> str | None:
    """The text of an answer line of either form; None if the line reports an error."""
    if row.get("error") or row["response"]["status_code"] != 200:
        return None
    choice = row["response"]["body"]["choices"][0]
    text: str = choice["message"]["content"] if "message" in choice else choice["text"]
    return text


def right_answer(text: str) -> str:
    a, b = text.rstrip("=").split("+")
    return str(int(a) + int(b))


def score(asked: Path, answered: Path) -> float:
    """Print how many of the rows in `asked` were answered right in `answered`; that share.

    A row without an answer is wrong.
    """
    questions = [json.loads(line)["custom_id"] for line in asked.read_text().splitlines()]
    lines = map(json.loads, answered.read_text().splitlines())
    answers = {row["custom_id"]: answer(row) for row in lines}
    wrong = [text for text in questions if answers.get(text) != right_answer(text)]
    for text in questions[:3]:
        print(f"{text} {answers.get(text)}")
    for text in wrong[:10]:
        print(f"wrong: {text} {answers.get(text)}, not {right_answer(text)}")
    print(f"{len(questions) - len(wrong)} of {len(questions)} right")
    return 1 - len(wrong) / len(questions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("path", type=Path)
    writing.add_argument("--count", type=int, default=500)
    scoring = commands.add_parser("score")
    scoring.add_argument("asked", type=Path)
    scoring.add_argument("answered", type=Path)
    args = parser.parse_args()
    if args.command == "write":
        write(args.path, args.count)
    elif score(args.asked, args.answered) < PASS:
        sys.exit(f"fewer than {PASS:.0%} are right")


if __name__ == "__main__":
    main()
