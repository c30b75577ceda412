"""The fencer: the privileged process that owns the life of PostgreSQL."""
