"""Bytes to values and back. PURE: no I/O, no clock, no randomness, no protobuf."""
