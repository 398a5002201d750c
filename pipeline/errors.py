"""What can go wrong in the pipeline, as one tree.

    PipelineError
    ├── ImageError     (OSError)       one image cannot be read: names the file and why
    ├── SourceError    (ValueError)    the image source as a whole
    ├── BackboneError  (ValueError)    unknown model, weights that do not fit
    ├── SettingError   (ValueError)    a setting that cannot be
    ├── DeviceError    (RuntimeError)  a device that is not there
    ├── MissingTaps    (LookupError)   a method needs taps that the cache lacks
    ├── MissingPackage (ImportError)   a package that only an extra installs is not there
    └── RunError       (ValueError)    a run directory that is not what was expected

Each also subclasses the builtin that a caller expects. Every message says what was expected, what
came, and what to do.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class PipelineError(Exception):
    """Root of everything that pipeline raises on purpose."""


class ImageError(PipelineError, OSError):
    """One image cannot be read."""


class SourceError(PipelineError, ValueError):
    """The image source cannot be used."""


class BackboneError(PipelineError, ValueError):
    """No such backbone, or weights that do not fit it."""


class SettingError(PipelineError, ValueError):
    """A setting has an impossible value."""


class DeviceError(PipelineError, RuntimeError):
    """The device asked for is not there."""


class MissingTaps(PipelineError, LookupError):
    """A method needs taps that the cache lacks."""


class MissingPackage(PipelineError, ImportError):
    """A package that only an extra installs is not there; `name` is what Python calls it."""


class RunError(PipelineError, ValueError):
    """A run directory is missing, unfinished, or another run's."""


@contextmanager
def needed_for(what: str, *, extra: str) -> Iterator[None]:
    """Around the import of what `pip install sidecache` alone does not bring, but `extra` does.

    Raises MissingPackage where it is not there. It stands at the imports themselves, so that
    commands and callers of any function are told the same, and no list of packages is kept here.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        package = "pillow" if package == "PIL" else package
        raise MissingPackage(
            f"{what} needs {package}, which is not installed: pip install 'sidecache[{extra}]'",
            name=error.name,
        ) from error


def gist(error: Exception) -> str:
    """The gist of another library's message: its first two lines, at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    short = " ".join(lines[:2]).rstrip(". ") or type(error).__name__
    return short if len(short) <= 200 else short[:200].rsplit(" ", 1)[0] + " …"


def some(names: Sequence[str], most: int = 3) -> str:
    """A list as messages show it: `a, b, c and 2 more`; `nothing` where it is empty."""
    if not names:
        return "nothing"
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
