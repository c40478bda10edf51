"""One module per contender; each runs in a separate process and writes a Measurement."""
