"""Every causal architecture of the pinned transformers, as a tiny model, through a whole run."""
