"""`python -I -m harmony.agent`: the agent."""

import sys

# structlog imports it for coloured tracebacks where it can: 3 MB and a tenth of a start that an agent is waited for.
sys.modules["rich"] = None  # type: ignore[assignment]

from harmony.agent.main import main  # noqa: E402 (after that)

main()
