"""For engineers: run folders, flags, checkpoints, loading, several processes. The lesson calls it; no reader
of the lesson has to enter."""
