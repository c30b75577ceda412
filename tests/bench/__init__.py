"""The pure parts of the failover bench."""
