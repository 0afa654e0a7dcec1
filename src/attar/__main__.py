"""``python -m attar``, which is what ``torchrun -m attar`` starts."""

from attar.cli import main

main()
