"""Prints docs/configuration.md: every key of the schema, with its type, default and what it does.

python -m spmd.runtime.configuration_page > docs/configuration.md
"""

import json
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, Field, fields
from typing import Any

from spmd.config import Config, sections

WIDTH = 118
HEAD = """# Configuration

Made from spmd/config.py by `make docs`: change it there. `python -m spmd.generate --cfg job` prints the keys with the
values that a command line gives them; what null came to stands in the start-up log and in `<run_dir>/config.yaml`.
Groups of values have names: `topology=pp2` takes conf/topology/pp2.yaml. Unknown keys and wrong types are errors.
Values with `=`, spaces or commas need Hydra's quotes inside the shell's: `'sampling.stop=["a=b","\\n\\n"]'`.
"""


def page() -> str:
    """The page, in Markdown."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield HEAD
    yield from _section("Input, output and the run", None, [member for member in fields(Config) if member.metadata])
    for name, section in sections().items():
        yield from _section(f"`{name}`", section.__doc__, fields(section), f"{name}.")


def _section(title: str, about: str | None, members: Iterable[Field[Any]], prefix: str = "") -> Iterator[str]:
    yield f"## {title}\n"
    if about:
        yield textwrap.fill(about, WIDTH) + "\n"
    for member in members:
        yield from _key(prefix + member.name, member)
    yield ""


def _key(name: str, member: Field[Any]) -> Iterator[str]:
    factory = member.default_factory
    default = member.default if factory is MISSING else factory()
    yield f"- **`{name}`** = `{_written(default)}`{_range(member)}"
    yield textwrap.fill(member.metadata["help"], WIDTH, initial_indent="  ", subsequent_indent="  ")


def _range(member: Field[Any]) -> str:
    """What values there are, if the schema says more than the type does."""
    if choices := member.metadata["choices"]:
        return f" ({', '.join(f'`{choice}`' for choice in choices)})"
    least = member.metadata["least"]
    kind = member.metadata["kind"] or getattr(member.type, "__name__", str(member.type)).replace(" | None", "")
    return f" ({kind})" if least is None else f" ({kind}, at least {least:g})"


def _written(value: Any) -> str:
    """A value as it is written on the command line."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


if __name__ == "__main__":
    print(page(), end="")
