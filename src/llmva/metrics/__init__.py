"""Numbers from labels: rates of answers, the objective of a run, and the front."""
