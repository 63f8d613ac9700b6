"""Quantities in words, as plans and reports tell them."""


def time_told(seconds: float) -> str:
    """Seconds up to two minutes, minutes up to two hours, else hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
