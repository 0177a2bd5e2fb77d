"""What a release must pass: ``./dev release-check``."""
