"""What every convolution split by channel group asks of its arguments."""

from twolevel.errors import UserError


def check_groups(groups: int, /, **channels: int) -> None:
    """Raise UserError unless `groups` is a positive divisor of each of the named channel numbers."""
    if groups < 1:
        raise UserError(f"groups={groups} is not positive; use 1 or more")
    for name, number in channels.items():
        if number % groups:
            fits = [g for g in range(1, number + 1) if all(c % g == 0 for c in channels.values())]
            some = ", ".join(map(str, fits[:8])) + (", ..." if len(fits) > 8 else "")
            raise UserError(f"groups={groups} does not divide {name}={number}; use one of {some}")
