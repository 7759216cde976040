"""Small data files for tests."""

import json

WORDS = " ".join(f"w{i}" for i in range(4000))


def write(path, value):
    """Write text, or anything else as JSON, into a file whose folder may not be there yet; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def lines(rows):
    """JSON lines."""
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
