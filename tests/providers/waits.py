"""What servers say about when to come back."""

from __future__ import annotations

NOW = 1_800_000_000  # Fri, 15 Jan 2027 08:00:00 GMT
RETRY_AFTER: list[tuple[dict[str, str], float | None]] = [
    ({}, None),
    ({"retry-after": "20"}, 20),
    ({"RETRY-AFTER": " 20 "}, 20),
    ({"retry-after": "0"}, 0),
    ({"retry-after": "1.5"}, 1.5),
    ({"retry-after": "5, 8"}, 8),
    ({"retry-after-ms": "1500"}, 1.5),
    ({"retry-after-ms": "250.5"}, 0.2505),
    ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
    ({"retry-after-ms": "soon", "retry-after": "9"}, 9),
    ({"retry-after-ms": "-1", "retry-after": "9"}, 9),
    ({"retry-after-ms": "inf", "retry-after": "9"}, 9),
    ({"retry-after": "Fri, 15 Jan 2027 08:01:30 GMT"}, 90),
    ({"retry-after": "Friday, 15-Jan-27 08:01:30 GMT"}, 90),
    ({"retry-after": "Fri Jan 15 08:01:30 2027"}, 90),
    ({"retry-after": "Fri, 15 Jan 2027 08:01:30 -0000"}, 90),
    ({"retry-after": "Fri, 15 Jan 2027 10:01:30 +0200"}, 90),
    ({"retry-after": "Fri, 15 Jan 2027 07:59:00 GMT"}, 0),
    ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0),
    ({"retry-after": "-5"}, None),
    ({"retry-after": "nan"}, None),
    ({"retry-after": "inf"}, None),
    ({"retry-after": "-inf"}, None),
    ({"retry-after": "soon"}, None),
    ({"retry-after": "in 5 minutes"}, None),
    ({"retry-after": ","}, None),
    ({"retry-after": "Fri, 99 Jan 2027 08:01:30 GMT"}, None),
    ({"retry-after": "Fri, 15 Jan 99999 08:01:30 GMT"}, None),
    ({"retry-after": "1e300"}, 1e300),
    ({"retry-after": "31536000"}, 31_536_000),
    ({"retry-after": "1" * 400}, None),
]
