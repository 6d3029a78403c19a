"""For teaching assistants and for students with a solution of their own: what is right and wrong in it, function by
function."""
