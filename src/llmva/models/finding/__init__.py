"""Which modules of a decoder write to its residual stream: candidates by structure, each proved by intervention."""
