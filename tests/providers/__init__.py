"""A provider on loopback, the real SDKs that ask it, and what their errors mean."""
