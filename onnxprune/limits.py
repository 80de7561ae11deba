"""The largest numbers that options may be; nothing is loaded for them."""

MOST_SEED = 2**63
MOST_THREADS = 1024  # that a model may be told to run in
