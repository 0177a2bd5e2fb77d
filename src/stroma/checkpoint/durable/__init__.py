"""Parts that the SQL stores and Redis share: sessions, rows, leases and the thread that writes."""
