"""`python -m fsl_cli` is `fsl`."""

from fsl_cli.cli import main

main()
