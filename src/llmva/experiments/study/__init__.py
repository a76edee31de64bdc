"""A study: many models, methods, seeds, data sets and judges, cell by cell, by any number of processes."""
