"""The decision core: pure. No I/O, no clock, no randomness."""
