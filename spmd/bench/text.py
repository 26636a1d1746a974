"""Chat rows of made-up English for benchmarks: words by Zipf's law in sentences, so many tokens long as ids would be.

The words are common ones, and of every ten one is a number or a name that no vocabulary holds whole: a tokenizer takes
for them about the time that it takes for prose.
"""

import json
import random
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from spmd.bench.workload import lengths
from spmd.config import WorkloadConfig

COMMON = """
the of and to in a is that for it as was with be by on not he this are or his from at which but have an had they you
were their one all we can her has there been if more when will would who so no out up into them then she time only
some could its new my than about other two may first after work any many people also these such where through back
years way even most over because how good well should each day us just those life here between long under place never
same another know while last might great world since against right came small used take three state himself few house
use during without again home around however found school thought think part general high upon government number water
left point fact does set night end called different asked system important yet always early enough seemed public room
among put head next began often nothing order given church power word light face large change line white family
country group money young problem became best river morning letter open weather market reason garden history book
paper story village question answer north window bridge summer winter stone travel doctor teacher music science
machine language engine station captain island mountain minister council industry theory method evidence character
picture
"""
SYLLABLES = "ba cor dan el fi gor hul in jar kem lo mar nev os pra qui rel sta tor ul ven wix yal zu"
RARE = 0.1  # of the words


def write_rows(path: Path, workload: WorkloadConfig, vocab_size: int, tokenizer: Any) -> None:
    """A file of chat rows whose prompts have, within a token or two, the workload's lengths, the template counted.

    Answers are greedy and of the workload's lengths, whatever the model says.
    """
    rng = random.Random(workload.seed)
    template = len(tokenizer.apply_chat_template(_messages(""), add_generation_prompt=True, return_dict=False))
    size = cache(lambda word: len(tokenizer.encode(word, add_special_tokens=False)))
    with path.open("w") as file:
        for number, (prompt, output) in enumerate(lengths(workload, vocab_size)):
            text, tokens = [], template
            for word in _words(rng):
                tokens += size(word)
                if tokens > prompt:
                    break
                text.append(word)
            body = {"messages": _messages("".join(text)), "max_tokens": output, "ignore_eos": True, "temperature": 0}
            row = {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(row) + "\n")


def _messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _words(rng: random.Random) -> Iterator[str]:
    """Words with the spaces and signs around them, without end."""
    common = COMMON.split()  # commonest first
    weights = list(accumulate(1 / (place + 2) for place in range(len(common))))
    start = ""
    while True:
        length = rng.randint(5, 20)
        for place in range(length):
            word = _rare(rng) if rng.random() < RARE else rng.choices(common, cum_weights=weights)[0]
            yield start + (word.capitalize() if place == 0 else word)
            start = ", " if rng.random() < 0.08 else " "
        start = rng.choice([". ", ". ", "? ", ".\n\n"])


def _rare(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return f"{rng.randint(2, 9999):,}"
    return "".join(rng.choices(SYLLABLES.split(), k=rng.randint(2, 4))).capitalize()
