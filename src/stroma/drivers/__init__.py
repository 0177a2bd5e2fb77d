"""Runs on other machines: the remote protocol and the Temporal driver."""
