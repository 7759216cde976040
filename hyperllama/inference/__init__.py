"""The frozen model that reads prefixes, and how good they are."""
