"""How fast hypergrad is beside others: every side in one process, interleaved, with its error."""
