"""The `vlmquant` command, also as `python -m vlmquant`: notes signals before anything is imported that takes time."""

import _signal  # type: ignore[import-not-found]  # what `signal` makes nice, at once
import sys

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # until our handlers are there, it ends the process without a word

from vlmquant import signals


def main() -> None:
    """Run the command line. Ends with 128 + n where signal n came at any time, whatever it met and whoever lost it."""
    signals.install()
    try:
        from vlmquant import cli

        try:
            cli.main()
        finally:
            signals.uninstall()
    except BaseException:
        # Where a signal ends an import halfway, all kinds of errors follow.
        if (number := signals.received()) is None:
            raise
        signals.uninstall()
        sys.exit(128 + number)
    if (number := signals.received()) is not None:
        sys.exit(128 + number)


if __name__ == "__main__":
    main()
