"""The demonstration: business documents, and a model provider that needs no key and no network."""
