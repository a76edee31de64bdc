"""What is shown of several runs: comparisons of methods and ablations, as pages, tables and CSV."""
