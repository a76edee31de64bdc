"""Charts as inline SVG that know nothing of runs: lines, points, lists of estimates, places for names."""
