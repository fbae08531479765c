"""Compile functions whose array arguments share no memory.

LLVM vectorises a loop only if it knows that what is written is not read again. For short loops its
checks at run time cost as much as the work; for lookups (gathers) there are none, and such loops
stay scalar. numba knows the property as a flag that its decorators do not offer.
"""

from __future__ import annotations

from typing import Any

from numba.core.compiler import Compiler


class Distinct(Compiler):
    """For ``njit(pipeline_class=Distinct)``: the caller's arrays do not overlap."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.state.flags.noalias = True
