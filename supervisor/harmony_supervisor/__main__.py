"""`python -I -m harmony_supervisor`: the supervisor."""

from harmony_supervisor.main import main

main()
