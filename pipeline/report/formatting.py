"""Format numbers as people read them; `render` offers each function to the templates as a filter of the same name."""

from pipeline.inference.timing import Gain

NO_BREAK, TIMES = "\N{NO-BREAK SPACE}", "\N{MULTIPLICATION SIGN}"


def compact(number: int) -> str:
    """Round a large number to three digits: ``3.76 M``."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= 0.9995 * unit:  # from there on three digits round up to it
            return f"{number / unit:.3g}{NO_BREAK}{name}"
    return str(number)


def fixed(number: float, digits: int) -> str:
    """Write a number with so many decimals."""
    return f"{number:,.{digits}f}"


def percent(share: float) -> str:
    """Write a fraction in percent, with one decimal: ``65.3 %``."""
    return f"{100 * share:.1f}{NO_BREAK}%"


def times(factor: float) -> str:
    """Write a factor: ``2.42x``, with the sign."""
    return f"{factor:.2f}{TIMES}"


def speedup(gain: Gain) -> str:
    """Write a measured speed-up, or `inconclusive` where the machine was too busy to measure one."""
    return times(gain.ratio) if gain.conclusive else "inconclusive"


def interval(gain: Gain) -> str:
    """Write the confidence interval of a speed-up: ``2.10 to 2.60``."""
    return f"{gain.low:.2f} to {gain.high:.2f}"


def threads(number: int) -> str:
    """Write a number of threads, of which 0 means all."""
    return {0: "all threads", 1: "1 thread"}.get(number, f"{number} threads")
