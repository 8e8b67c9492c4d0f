"""The command `mini-impl`, so that Ctrl-C ends it without a traceback while torch is still being imported."""

import signal


def main() -> None:
    """Import the command, which takes a second, and run it."""
    ours = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mini_impl.cli import main

    signal.signal(signal.SIGINT, ours)
    main()
