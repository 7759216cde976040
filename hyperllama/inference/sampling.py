"""Settings of transformers' `generate`: what they come to, and what of them cannot be meant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")


def sampling(temperature: float | None, top_p: float | None, max_new_tokens: int | None = None) -> dict[str, Any]:
    """Settings for a temperature, of which none and 0 are greedy, and a share `top_p` of the likeliest tokens to draw from.

    With `top_p` alone the temperature is 1. They may contradict each other: see `contradictions`.
    """
    settings: dict[str, Any] = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    if temperature == 0:
        return settings | ({} if top_p is None else {"top_p": top_p})
    if temperature is not None or top_p is not None:
        settings |= {"do_sample": True, "temperature": 1.0 if temperature is None else temperature}
        settings["top_p"] = 1.0 if top_p is None else top_p
    return settings


def contradictions(settings: Mapping[str, Any]) -> Iterator[str]:
    """What settings say and at the same time do not, "name: what is wrong; what to do" each."""
    drawn = [name for name in SAMPLING if settings.get(name) is not None]
    if drawn and not settings.get("do_sample"):
        yield f"{drawn[0]}: is for sampling, but answers are greedy; give a temperature above 0, or leave {drawn[0]} out"
    if settings.get("do_sample") and settings.get("temperature") == 0:
        yield "temperature: 0 is greedy, but do_sample is true; set it to false, or give a temperature above 0"
    if settings.get("num_return_sequences", 1) != 1:
        yield "num_return_sequences: there is one answer a prompt; leave it out"
    if settings.get("max_new_tokens", 1) < 1:
        yield f"max_new_tokens: at least 1, not {settings['max_new_tokens']}"


def unknown(settings: Mapping[str, Any]) -> list[str]:
    """Names that are no settings of the installed transformers' `generate`."""
    from transformers import GenerationConfig

    return sorted(set(settings) - set(GenerationConfig().to_dict()))
