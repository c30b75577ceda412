"""Harmony: the agent, its decision core, and the command line."""
