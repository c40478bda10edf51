"""Three ways to train the same adapter on the same rows, compared in one run on one machine: see README.md."""
