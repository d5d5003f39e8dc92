"""Training: text, lanes, the loop, what a run leaves on disk and shows people."""
