"""`python -m pairdr`, and what torchrun starts: `torchrun -m -- pairdr train ...`."""

from pairdr.cli import main

main()
