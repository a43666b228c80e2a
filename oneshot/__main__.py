"""``python -m oneshot`` is the ``oneshot`` command."""

from oneshot.cli import main

main()
