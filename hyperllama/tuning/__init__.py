"""Prefix tuning: what is trained, where it starts, and when it stops."""
