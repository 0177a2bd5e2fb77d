"""Tables, statements and rows that the SQLite and the Postgres store share."""
