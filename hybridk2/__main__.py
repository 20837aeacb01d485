"""`python -m hybridk2`: the command line, for where the script is not on the path."""

from hybridk2.cli import main

main(prog_name="hybridk2")
