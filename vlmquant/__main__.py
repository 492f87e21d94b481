"""`python -m vlmquant` is the `vlmquant` command."""

from vlmquant.cli import main

main()
