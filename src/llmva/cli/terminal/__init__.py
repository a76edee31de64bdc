"""What a person sees of a command, and how it ends: display, Ctrl-C, and streams that may be closed."""
