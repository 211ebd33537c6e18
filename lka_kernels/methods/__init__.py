"""Ways of training a model, by name: which parameters learn, and what is added to the model.

A method is one file with one :class:`Method`, listed in ``METHODS`` below. The trainer, its
command line and the sweep know methods only through this table.
"""

from __future__ import annotations

from . import full, linear, lka
from .base import Method

METHODS: dict[str, Method] = {
    method.name: method for method in (lka.METHOD, linear.METHOD, full.METHOD)
}

__all__ = ["METHODS", "Method", "get_method"]


def get_method(name: str) -> Method:
    """The method called ``name``; ValueError lists those there are."""
    if name not in METHODS:
        raise ValueError(f"method {name!r} is unknown; there are {', '.join(METHODS)}")
    return METHODS[name]
