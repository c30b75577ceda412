"""`python -I -m harmony_fencer`: the fencer."""

from harmony_fencer.main import main

main()
