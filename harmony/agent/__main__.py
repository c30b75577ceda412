"""`python -I -m harmony.agent`: the agent."""

from harmony.agent.main import main

main()
