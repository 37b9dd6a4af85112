"""Range checks of an algorithm's options; errors name the key as typed. `positive` leaves None to the constructor."""


def positive(**options: float | None) -> None:
    """Refuses options that are 0 or less."""
    for name, value in options.items():
        if value is not None and value <= 0:
            raise ValueError(f"algo.{name} = {value}, but it must be positive.")


def at_least(least: int, **options: float) -> None:
    """Refuses options below `least`."""
    for name, value in options.items():
        if value < least:
            raise ValueError(f"algo.{name} = {value}, but it must {'not be negative' if least == 0 else f'be at least {least}'}.")
