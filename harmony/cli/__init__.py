"""harmonyctl: the command line."""
