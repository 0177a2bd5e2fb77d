"""Engine, store and processes on one seeded scheduler: `./dev run python -m tests.simulation --help`."""
