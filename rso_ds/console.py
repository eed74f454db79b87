"""Where the log of the package goes as long as the program does not say: messages as they are, to the console.

A run's first lines say what is in effect, so they must be seen without any set-up.
``logging.getLogger("rso_ds").setLevel("WARNING")`` switches them off. A program that gives this logger a level or a
handler before it imports the package is left with just that.
"""

from __future__ import annotations

import logging
import sys


class ConsoleHandler(logging.Handler):
    """Information to standard output, warnings and errors to standard error, whatever these are at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
            print(self.format(record), file=stream, flush=True)
        except Exception:
            self.handleError(record)


def log_to_console() -> None:
    """Install the handler, unless the program has configured the logger "rso_ds". Idempotent."""
    logger = logging.getLogger("rso_ds")
    if logger.handlers or logger.level != logging.NOTSET:
        return
    logger.addHandler(ConsoleHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a program's own root handler would show everything twice
