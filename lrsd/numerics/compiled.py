"""Loops compiled to machine code, and several of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar, cast

import torch
from numba import njit

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
R = TypeVar("R")


def compiled(function: F) -> F:
    """`function` compiled by numba at its first call; it then runs beside other threads of the interpreter.

    The machine code is kept in a file for the next process. Where no directory can be written, such as a
    read-only installation without a home, every process compiles anew, which takes seconds.
    """
    # A division by zero is not looked for, as everywhere in numpy.
    compile_ = partial(njit, nogil=True, error_model="numpy")
    try:
        return cast(F, compile_(cache=True)(function))
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        return cast(F, compile_()(function))


def in_threads(call: Callable[[T], R], arguments: Iterable[T]) -> list[R]:
    """`call` of each argument, in order, on as many threads as torch has.

    Threads of our own: those of OpenMP, behind numba's `parallel`, abort in a child forked after their use.
    """
    arguments = list(arguments)
    threads = min(torch.get_num_threads(), len(arguments))
    if threads <= 1:
        return [call(argument) for argument in arguments]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(call, arguments))
