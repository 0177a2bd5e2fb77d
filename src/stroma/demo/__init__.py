"""The demo: a pipeline over real documents, and a model provider without a key or network."""
