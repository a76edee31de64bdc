"""What benchmarks/fuzz.py breaks, and how: one module for each kind of file that llmva reads."""
