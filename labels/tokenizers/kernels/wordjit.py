"""How the inner functions of the compiled paths are compiled: without counting references to arrays.

numba counts an atomic reference up and down for every array that a function is given, inlined or not: four fifths of the time of a
look-up that is a handful of instructions. These functions only borrow what their callers hold; they make and return no arrays.
"""

from typing import Any

from numba import njit

# Underscored, but numba's own way (numba/core/options.py) since the first of its runtime.
_BORROWING: dict[str, Any] = {"nogil": True, "_nrt": False}
compiled = njit(**_BORROWING)
inlined = njit(forceinline=True, **_BORROWING)
