"""The supervisor: starts, watches and restarts the agent and the fencer."""
