"""Lines of JSON that Python reads, and what is wrong with the others."""

import json


def json_object(line: str) -> dict:
    """The object on a line. Raises ValueError with the reason if there is none."""
    if not line.strip():
        raise ValueError("the line is empty")
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"invalid JSON: {error.msg} at column {error.colno}"
        start = line.strip()
        if start == "{" or start.startswith("["):
            reason += "; each line must hold one JSON object"
        raise ValueError(reason) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"JSON that cannot be read: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is needed, not {type(row).__name__}")
    return row


def text_problem(row: dict, key: str, wanted: str = "text") -> str | None:
    """Why a row has no text at a key, None if it has one. wanted: what the message asks for."""
    if key not in row:
        return f"no key {key!r}; keys here: {', '.join(row) or 'none'}"
    if not isinstance(row[key], str):
        return f"{key!r} is {type(row[key]).__name__}, not {wanted}"
    return None
