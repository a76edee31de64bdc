"""The five steps of the method (observe, identify, score, select, align), and our additions (docs/method.md)."""
