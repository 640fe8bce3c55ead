"""One way to fail: bad input is one line on standard error and exit code 2, with no traceback unless asked for."""

import os
import sys
import traceback
from collections.abc import Callable

OK, FAILED, BAD_INPUT = 0, 1, 2


class UserError(Exception):
    """Input that the person at the keyboard can correct; the message says what was expected, what came, what to do."""


def run_cli(main: Callable[[], int | None], debug: bool = False) -> int:
    """Run a command's body and turn its outcome into the exit code of every tool in this project.

    Args:
        main: the body, arguments already bound; returns an exit code, or None for success.
        debug: print the traceback before the line (the tools' ``--debug``).

    Returns:
        0 on success, 2 on `UserError` (bad input), 1 on any other failure or Ctrl-C.
    """
    try:
        return main() or OK
    except UserError as error:
        return _report(str(error), BAD_INPUT, debug)
    except BrokenPipeError:  # the reader of our output has left, as in `info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter still flushes at exit
        return FAILED
    except KeyboardInterrupt:
        return _report("interrupted", FAILED, debug)
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        return _report(f"unexpected {detail} (run again with --debug for the traceback)", FAILED, debug)


def _report(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code
