"""The agent: the unprivileged heartbeat and decision process."""
