"""The `vlmquant` command, also as `python -m vlmquant`: notes signals before anything is imported that takes time."""

import sys

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
