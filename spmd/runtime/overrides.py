"""What stands on the command line, made ready for Hydra: a key that is text takes it as it stands. Imports no torch.

Hydra parses values by a grammar of its own: 20240101_120000 is a number to it, and a path with é, #, &, !, ~, = or a
comma an error. What it takes for text, null or an interpolation is left to it; anything else becomes a quoted string.
"""

import difflib
import os
import re

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from spmd.config import keys
from spmd.messages import Mistake

TEXT = frozenset(name for name, member in keys().items() if member.type in (str, str | None))
TEXTS = frozenset(name for name, member in keys().items() if member.type in (list[str], list[str] | None)) | {"input"}
EITHER = frozenset({"input"})  # a text or a list of texts
PATHS = frozenset(("input", "output", "run_dir", "model.path", "model.tokenizer"))
OVERRIDE = re.compile(r"(\+{0,2}([A-Za-z_][\w.]*)=)(.*)", re.DOTALL)
CARET = re.compile(r"^(.*)\n( *)\^$", re.MULTILINE)  # a line, and below it where the lexer found no way on
SPECIAL = "= , ( ) or ~"
MOST_HINTS = 2


def as_typed(words: list[str]) -> list[str]:
    """The words for Hydra, with the values of keys that are text quoted where Hydra would take them for another thing.

    Raises:
        Mistake: an element of a list of texts reads as a number or the like, so that its text would be another one.
    """
    parser = OverridesParser.create()
    return [_as_typed(word, parser) for word in words]


def quoted(text: str) -> str:
    """A value that Hydra takes for just this text; interpolations in it stay what they are."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda end: end[1] * 2 + end[2].replace("'", "\\'"), text) + "'"


def hints(said: str) -> list[str]:
    """What to do about a complaint of Hydra's, if more can be said than Hydra does."""
    if found := re.search(r"Could not find 'model/(.+?)'", said):
        return [f"model={found[1]} chooses one of these; a folder or Hub id is given as model.path={found[1]}"]
    if found := re.search(r"Could not override '([\w.]+)'", said):
        return [f"did you mean {' or '.join(near)}?"] if (near := _near(found[1])) else []
    if "override_grammar" in said:
        found = CARET.search(said)
        what = found[1][len(found[2]) :][:1] if found else SPECIAL
        return [f"a value that holds {what} needs quotes inside those of the shell: 'key=\"a=b\"'"]
    return []


def _as_typed(word: str, parser: OverridesParser) -> str:
    found = OVERRIDE.fullmatch(word)
    if found is None or found[2] not in TEXT | TEXTS:
        return word
    start, name, text = found.groups()
    try:
        value = parser.parse_override(word).value()
    except HydraException:
        value = NotImplemented
    if name in TEXTS:
        if isinstance(value, list):
            _check_texts(word, value, text)
        if isinstance(value, list) or name not in EITHER:
            return word
    if value is None or isinstance(value, str):
        return word
    return start + quoted(os.path.expanduser(text) if name in PATHS else text)


def _check_texts(word: str, values: list[object], text: str) -> None:
    written = {element.strip() for element in text.strip()[1:-1].split(",")}
    for value in values:
        if not isinstance(value, str) and str(value) not in written:
            raise Mistake(f'{word}: {value} is no text; quote each element, as in \'sampling.stop=["1e3","true"]\'')


def _near(name: str) -> list[str]:
    """Keys that somebody who wrote `name` may mean: those of that name in a section, else those written alike."""
    last = name.rpartition(".")[2]
    same = [key for key in keys() if key.rpartition(".")[2] == last]
    return same[:MOST_HINTS] or difflib.get_close_matches(name, keys(), n=MOST_HINTS, cutoff=0.75)
