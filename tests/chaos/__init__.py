"""Deliberate faults, and a check that the promises of docs/durability.md hold: `./dev chaos --help`."""
