"""Loops compiled to machine code, and several of them at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial, update_wrapper
from threading import RLock
from typing import Any, ClassVar, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
R = TypeVar("R")


class _Compiled:
    """A function that numba compiles at its first call.

    numba itself is not imported before that: it takes half a second, and vLLM's workers break at their start
    when it is there already. What is compiled then takes the place of all such functions in their modules,
    where numba looks for those that call each other.
    """

    _all: ClassVar[list[_Compiled]] = []
    _lock: ClassVar[RLock] = RLock()

    def __init__(self, function: Callable[..., Any], reorders: bool) -> None:
        update_wrapper(self, function)
        self._function, self._reorders = function, reorders
        self._made: Any = None
        self._all.append(self)

    def __call__(self, *args: Any) -> Any:
        return self.made(*args)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.made, name)

    @property
    def made(self) -> Any:
        if self._made is None:
            with self._lock:
                made = {one: one._made or _jit(one._function, one._reorders) for one in self._all}
                for one in made:
                    names = one._function.__globals__
                    names |= {k: made[v] for k, v in names.items() if isinstance(v, _Compiled)}
                for one, function in made.items():  # only now may another thread call it
                    one._made = function
        return self._made


def compiled(function: F, *, reorders: bool = False) -> F:
    """`function` compiled by numba at its first call; it then runs beside other threads of the interpreter.

    reorders: floating-point sums may be taken in any order.
    """
    return cast(F, _Compiled(function, reorders))


def _jit(function: F, reorders: bool) -> F:
    """The machine code is kept in a file for the next process. Where no directory can be written, such as a
    read-only installation without a home, every process compiles anew, which takes seconds."""
    from numba import njit

    # Not all that "fastmath" allows: infinities and not-a-numbers must come through.
    fastmath = {"reassoc", "contract", "nsz"} if reorders else False
    # A division by zero is not looked for, as everywhere in numpy.
    compile_ = partial(njit, nogil=True, error_model="numpy", fastmath=fastmath)
    try:
        return cast(F, compile_(cache=True)(function))
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        return cast(F, compile_()(function))


reordered = partial(compiled, reorders=True)


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


class _Crew:
    """Threads that stay, for work of microseconds."""

    pool: ThreadPoolExecutor | None = None
    threads = 0

    def of(self, threads: int) -> ThreadPoolExecutor:
        if self.pool is None or self.threads < threads:
            self.pool, self.threads = ThreadPoolExecutor(threads), threads
        return self.pool

    def forget(self) -> None:
        self.pool = None


_crew = _Crew()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_crew.forget)  # a child has none of its parent's threads


def side_by_side(call: Callable[[int], None], parts: int) -> None:
    """`call` of 0, 1, ... parts - 1 at the same time, the first one here. It must not call this again."""
    if parts == 1:
        call(0)
        return
    others = [_crew.of(parts - 1).submit(call, part) for part in range(1, parts)]
    call(0)
    for other in others:
        other.result()
