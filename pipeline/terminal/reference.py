"""docs/cli.md: every command with its arguments and flags, from what `--help` is made of."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

HEAD = """\
# Commands

`make docs/cli.md` writes this page, a test compares it with the code. `sidecache COMMAND --help`
says the same. Results go to stdout (`--json` where a command has it), everything else to stderr.
Exit codes: 0; 1 a known error, one line without traceback; 2 usage; 130 and 143 after Ctrl-C and
SIGTERM. A value that ends in `,…` may be several, with commas between them.
"""


def reference(commands: click.Group) -> str:
    """The text of docs/cli.md."""
    parts = [HEAD]
    for name, command in commands.commands.items():
        parts += _section(name, command)
    return "\n".join(parts)


def _section(name: str, command: click.Command) -> Iterator[str]:
    arguments = [_argument(p) for p in command.params if isinstance(p, click.Argument)]
    options = [p for p in command.params if isinstance(p, click.Option)]
    text, _, example = inspect.cleandoc(command.help or "").partition("\n\n\b\n")
    example = example.partition("\n")[2]  # its first line only says that it is one
    usage = " ".join([name, *arguments, *(["[FLAGS]"] if options else [])])
    yield f"## {name}\n\n    sidecache {usage}\n\n{text}\n"
    if example:
        yield f"```sh\n{inspect.cleandoc(example)}\n```\n"
    if options:
        rows = "\n".join(map(_row, options))
        yield f"| flag | what it is | default |\n|---|---|---|\n{rows}\n"


def _argument(argument: click.Argument) -> str:
    name = str(argument.name).upper() + ("…" if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _row(option: click.Option) -> str:
    told, _, default = (option.help or "").partition("  [default: ")
    if option.required:
        default = "*must be given*"
    elif option.secondary_opts and option.default:
        default = "on"
    elif option.show_default:
        value = option.default
        default = ", ".join(value) if isinstance(value, tuple) else str(value)
    names = sorted([*option.opts, *option.secondary_opts], key=len)
    names[-1] += _value(option)
    cells = [", ".join(f"`{name}`" for name in names), told, default.removesuffix("]")]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _value(option: click.Option) -> str:
    """What it takes, behind a blank; nothing for a switch."""
    if option.is_flag:
        return ""
    if isinstance(option.type, click.Choice):
        return " " + "|".join(option.type.choices)
    return " " + option.type.name.upper().replace("INTEGER", "INT")
