"""What reproduce.py runs and writes: the arms, what is kept of each, the claims, the page."""
