"""The failover bench: peers (Harmony, Patroni), scenarios, clients and what is computed from the clients' records."""
