"""How a command ends: a known error is one line without traceback.

Exit codes: 0; 1 a known error; 2 usage (click's own); 130 and 143 after Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import click

from pipeline.process import Sigterm, Terminated, settle_process

KEPT = "what was finished is kept, the same command goes on from there"


class Sidecache(click.Group):
    """The group of commands: settles the process before any of them loads torch, and turns what
    ends a command early into one line on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        settle_process()
        with Sigterm() as sigterm:
            try:
                return super().invoke(ctx)
            except Terminated:
                _fail(f"terminated; {KEPT}", 143)
            except KeyboardInterrupt:
                _fail(f"interrupted; {KEPT}", 130)
            except BrokenPipeError:
                raise SystemExit(1) from None
            except Exception as error:
                if _known(error):
                    _fail(str(error), 1)
                if sigterm.has_come():  # and a worker died of it first
                    _fail(f"terminated; {KEPT}", 143)
                raise


def _known(error: Exception) -> bool:
    """Whether our own trees raised it; looked up by name, so as not to import them for `--help`."""
    roots = (("cache.errors", "CacheError"), ("pipeline.errors", "PipelineError"))
    trees = tuple(
        getattr(sys.modules[module], name) for module, name in roots if module in sys.modules
    )
    return isinstance(error, trees)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"sidecache: {message}", err=True)
    raise SystemExit(code)
