"""harmonyctl demo: a whole cluster on this machine, broken on purpose and measured."""
