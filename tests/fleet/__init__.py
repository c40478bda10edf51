"""A fleet in virtual time: nodes of which some are broken, runs that share them, and one operator."""
