"""Exit codes of every verb."""

#: All succeeded; some items failed; the command cannot be carried out as given; stopped by the user (128 + SIGINT).
OK, SOME_FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130
