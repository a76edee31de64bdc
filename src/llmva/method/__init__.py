"""The method, step by step: observe, identify, select and align, and what chooses among the steps."""
