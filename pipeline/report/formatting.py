"""Format numbers for readers; `render` offers each function to the templates as a filter of the same name."""

from pipeline.inference.timing import Gain

NO_BREAK, TIMES, MINUS = "\N{NO-BREAK SPACE}", "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}"
UNKNOWN = "unknown"
"""In place of figures of a teacher whose operations cannot be counted."""


def compact(number: int | None) -> str:
    """Round a large number to three digits: ``3.76 M``."""
    if number is None:
        return UNKNOWN
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= 0.9995 * unit:  # from here on, three digits round up to the unit
            return f"{number / unit:.3g}{NO_BREAK}{name}"
    return str(number)


def fixed(number: float, digits: int) -> str:
    """Format with a fixed number of decimals."""
    return f"{number:,.{digits}f}"


def percent(share: float | None) -> str:
    """Format a fraction in percent, with one decimal: ``65.3 %``."""
    return UNKNOWN if share is None else f"{100 * share:.1f}{NO_BREAK}%"


def saving(share: float | None) -> str:
    """Format a reduction as a change in percent, with a minus sign, or a plus where something became larger."""
    return UNKNOWN if share is None else f"{MINUS if share >= 0 else '+'}{percent(abs(share))}"


def fewer(share: float) -> str:
    """Format a reduction in words: ``65.3 % fewer``, or ``12.0 % more`` where something became larger."""
    return f"{percent(abs(share))} {'fewer' if share >= 0 else 'more'}"


def times(factor: float | None) -> str:
    """Format a factor, followed by a multiplication sign: ``2.42x``."""
    return UNKNOWN if factor is None else f"{factor:.2f}{TIMES}"


def speedup(gain: Gain) -> str:
    """Format a speed-up, or return `inconclusive` if the timings were too few or too noisy."""
    return times(gain.ratio) if gain.conclusive else "inconclusive"


def interval(gain: Gain) -> str:
    """Format the 95 % confidence interval of a speed-up: ``2.10 to 2.60``."""
    return f"{gain.low:.2f} to {gain.high:.2f}"


def threads(number: int) -> str:
    """Format a number of threads; 0 stands for all."""
    return {0: "all threads", 1: "1 thread"}.get(number, f"{number} threads")
