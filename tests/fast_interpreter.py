"""Triton's interpreter looks through all of ``triton.language`` for what to replace at every launch and at every call
of a ``@triton.jit`` function in another; a third of its time. What is there to replace never changes."""

import functools
import inspect

from triton.language.core import is_builtin
from triton.runtime import interpreter


@functools.cache
def _names_of_builtins(place):
    return [name for name, member in inspect.getmembers(place) if is_builtin(member)]


def _patch_builtin(place, builder, *scope):  # Triton 3.6 has no scope
    for name in _names_of_builtins(place):
        if is_builtin(member := getattr(place, name)):  # not replaced already, by the function that called this one
            interpreter._patch_attr(place, name, member, builder, *scope)


def install():
    interpreter._patch_builtin = _patch_builtin
