"""`python -m harmony`: harmonyctl."""

from harmony.cli.main import main

main()
