"""For sceptics: speed and memory measured, mistakes put in and caught, mutants of the mathematics.
Nothing of the lesson imports it."""
