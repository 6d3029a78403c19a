"""For the curious: the toy world in which `make demo` runs the whole lesson offline, made from a grammar and two small
models."""
