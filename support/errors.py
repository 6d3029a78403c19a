"""What a user can put right, told apart from what is wrong with the code. Plain Python."""

import re

AGAIN = "call it again: what is finished is kept, training goes on from its checkpoint"


class UserError(Exception):
    """Something that the caller can put right. Its message is one line: what is wrong and what to do."""


def out_of_memory(error):
    """True if that is what it says, in the words of Python, PyTorch, CUDA or oneDNN."""
    said = "out of memory|n[o']t (allocate|enough) memory|bad_alloc|ALLOC_FAILED|create a primitive"
    return isinstance(error, MemoryError) or bool(re.search(said, str(error), re.IGNORECASE))
