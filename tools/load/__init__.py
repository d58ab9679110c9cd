"""Servers and load generators for the demo, the bench and the tests.

Each is a program of its own on the standard library only, so that it starts at once inside any namespace, whatever
environment surrounds it: `python tools/load/echo_server.py --help`.
"""
