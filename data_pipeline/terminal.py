"""What the terminal can show: its width, colors, and characters. All processes of ours ask here."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import select
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from typing_extensions import Buffer

from papilio.data_pipeline.crash import describe_unforeseen

# People read tables of fewer columns than this badly; NARROW is for where a line must not wrap.
MIN_COLUMNS = 80
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# What stands for characters that a stream's encoding does not have, where another says the same.
PLAIN = str.maketrans(
    dict.fromkeys("█▉▊▋▌▍▐■▓", "#")
    | dict.fromkeys("▎▏▒", "=")
    | dict.fromkeys("░·", ".")
    | dict.fromkeys("─━\u2013\u2014\u2010\u2011\u2212", "-")  # rules, dashes, hyphens, minus
    | dict.fromkeys("│┃", "|")
    | dict.fromkeys("┌┐└┘├┤┬┴┼", "+")
    | dict.fromkeys("\u201c\u201d\u201e", '"')
    | dict.fromkeys("\u2018\u2019", "'")
    | {"\u00d7": "x", "→": "->", "←": "<-", "…": "...", "≥": ">=", "≤": "<=", "µ": "u", "μ": "u", "✓": "+", "✗": "x"}
)


def make_streams_safe() -> None:
    """Let stdout and stderr replace what their encoding cannot show, instead of ending the process."""
    codecs.register_error("plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # None where it was closed, another object in tests
            stream.reconfigure(errors="plain")


def drop_what_has_no_room() -> None:
    """Let stdout and stderr drop what a full disk does not take: a training is worth more than its words."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, none, or no file
            buffer = io.BufferedWriter(_RoomyFile(stream.fileno(), "w", closefd=False))
            roomy = io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True)
            stream.flush()
            setattr(sys, name, roomy)


class _RoomyFile(io.FileIO):
    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in FULL:
                raise
            return memoryview(data).nbytes


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(PLAIN)
    return "".join(char if char.isascii() else "?" for char in text), error.end


def num_columns(stream: TextIO | None = None) -> int | None:
    """Return the width of the terminal that a stream is, None where it is none (a file, a pipe).

    COLUMNS comes before what the terminal says, as for other programs.
    """
    stream = stream or sys.stdout
    try:
        is_terminal = stream.isatty()
    except ValueError:  # closed
        return None
    return max(1, shutil.get_terminal_size().columns) if is_terminal else None


def table_columns(fewest: int = MIN_COLUMNS) -> int:
    """Return the width for tables on stdout: COLUMNS or the terminal's, but not fewer than are readable."""
    return max(fewest, shutil.get_terminal_size().columns)


def fold(line: str, indent: int) -> str:
    """Break a line at blanks, where the terminal would break it anywhere; what goes on begins with `indent` blanks."""
    width = num_columns()
    if width is None or len(line) <= width:
        return line
    return textwrap.fill(
        line, max(width, indent + 20), subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def can_draw_over(stream: TextIO | None = None) -> bool:
    """Whether a line can be drawn over the one before: on a terminal that knows more than plain text."""
    return num_columns(stream) is not None and os.environ.get("TERM") not in (None, "", "dumb")


def has_colors(stream: TextIO | None = None) -> bool:
    """Whether a stream shows colors: a terminal that knows them, unless NO_COLOR says that its reader wants none."""
    return can_draw_over(stream) and not os.environ.get("NO_COLOR")


@contextmanager
def ends_quietly(*, is_child: bool = False, shows_traceback: bool = False) -> Iterator[None]:
    """End the process with a status and in a line at most: its output cannot be written, Ctrl-C, or an error.

    Args:
        is_child: its parent got the Ctrl-C, too, and says so.
        shows_traceback: of an error that nobody foresaw, as a process does whose output is a log.

    Raises:
        SystemExit: 141 when its reader has gone (`| head`), 130, as a shell has it, or 1 after an error.
    """
    try:
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
    except BrokenPipeError as error:
        if not discard_unread():  # another pipe or connection broke
            print(f"papilio: error: {describe_unforeseen(error)}", file=sys.stderr)
            raise SystemExit(1) from None
        raise SystemExit(128 + signal.SIGPIPE) from None
    except KeyboardInterrupt:
        if not is_child:
            print("papilio: interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        name = discard_unwritten() if isinstance(error, OSError) and error.errno in FULL else None
        if name is None and shows_traceback:
            raise
        what = describe_unforeseen(error)
        if name is not None:
            what = f"{name} cannot be written: {os.strerror(error.errno or 0)}; lead it elsewhere"  # type: ignore[attr-defined]
        with contextlib.suppress(OSError):
            print(f"papilio: error: {what}", file=sys.stderr)
            sys.stderr.flush()
        raise SystemExit(1) from None


def discard_unread() -> bool:
    """Let stdout and stderr that nobody reads any more lead nowhere; whether there are any."""
    has_found = False
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, none, or no file
            poll = select.poll()
            poll.register(stream.fileno(), select.POLLOUT)
            if any(event & select.POLLERR for _, event in poll.poll(0)):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                has_found = True
    return has_found


def discard_unwritten() -> str | None:
    """Let the first of stdout and stderr that takes nothing more (a full disk) lead nowhere, and name it."""
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        with contextlib.suppress(ValueError, AttributeError):  # closed, none, or no file
            try:
                stream.flush()
                os.write(stream.fileno(), b"\n")  # a stream may have dropped what it could not write
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                return name
    return None


def format_duration(seconds: float, decimals: int = 0) -> str:
    """Write seconds for people: "12 s" (with `decimals`, if any), "3 min 05 s", "2 h 07 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.{decimals}f} s"
