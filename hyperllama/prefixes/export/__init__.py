"""Prefixes in the formats of other tools."""
