"""Numbers as people read them."""

NO_BREAK = "\N{NO-BREAK SPACE}"
TIMES, MINUS, TO = "\N{MULTIPLICATION SIGN}", "\N{MINUS SIGN}", "\N{RIGHTWARDS ARROW}"


def count(number: int) -> str:
    """A large number in three digits: ``3.76 M``."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= 0.9995 * unit:  # from there on three digits round up to it
            return f"{number / unit:.3g}{NO_BREAK}{name}"
    return str(number)


def percent(share: float) -> str:
    """A fraction in percent, with one decimal: ``65.3 %``."""
    return f"{100 * share:.1f}{NO_BREAK}%"


def times(factor: float) -> str:
    """A factor: ``2.42x``, with the sign."""
    return f"{factor:.2f}{TIMES}"
