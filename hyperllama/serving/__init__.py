"""Prefixes served by engines that people run: a connector and a middleware for vLLM, neither of which changes it."""
