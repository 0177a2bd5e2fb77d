"""Dispatchers: they decide which process drives a run; the engine and the store decide what is done."""
