"""Entry of the command line, and the only place where errors become exit codes.

Exit status: 0 done, 2 the request is wrong, 3 the host cannot, 4 the laboratory failed or a trial is
void, 1 anything else, 130 interrupted.
"""

from __future__ import annotations

import os
import sys

from appliance.errors import HotcellError


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``hotcell``; always ends by :class:`SystemExit`."""
    try:
        status = _run(argv)
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        # The reader of our output left. Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    if status == 130:
        print("interrupted", file=sys.stderr)
    sys.exit(status)


def _run(argv: list[str] | None) -> int:
    # Imported here, so that an interruption of the imports (0.2 s) is met by main() too.
    import typer
    from typer.exceptions import TyperException

    from appliance.cli.app import app
    from appliance.cli.common import INTERRUPTED, exit_code, note, say_error

    try:
        status = app(argv, prog_name="hotcell", standalone_mode=False)
    except HotcellError as e:
        say_error(e)
        return exit_code(e)
    except TyperException as e:
        note(f"error: {e.format_message()}")
        note("what to do: see `hotcell --help`, or `hotcell VERB --help`")
        return e.exit_code
    except typer.Abort:
        return INTERRUPTED
    return status if isinstance(status, int) else 0
