"""Flows: plain Python as a durable pipeline.

The public names are loaded from ``stroma``; ``definition`` is where a flow begins, ``body`` where it is run.
"""
