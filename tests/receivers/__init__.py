"""The systems that telemetry goes to, for tests: real ones where there are packages of them, on free ports of
loopback.

The classes are context managers. The fixtures are in `tests.receivers.fixtures`; a test module that wants
them says `pytest_plugins = ["tests.receivers.fixtures"]`.
"""
