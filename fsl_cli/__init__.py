"""Few-shot learning. `from fsl_cli import load`; the rest is the command line."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fsl_cli.loading import load as load
    from fsl_cli.loading import load_classifier as load_classifier

__all__ = ["load", "load_classifier"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fsl_cli' has no attribute {name!r}")
    from fsl_cli import loading  # torch takes a second to import, and `fsl --help` must not

    return getattr(loading, name)
