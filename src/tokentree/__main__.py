"""The command, as the system starts it."""

from __future__ import annotations

import signal

from tokentree.uncollected import uncollected


def start() -> None:
    """Runs the command. Before it listens to Ctrl-C, and behind its end, that ends the process without a word."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with uncollected:
        from tokentree.cli.main import main

    main()


if __name__ == "__main__":
    start()
