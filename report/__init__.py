"""For whoever has runs: results.md, every number and sample that the assignment asks for, made from run folders.
Loads no torch."""
