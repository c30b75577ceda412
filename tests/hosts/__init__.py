"""Tests on real hosts: systemd, units, users, reboots and power cuts, each host a container of its own."""
