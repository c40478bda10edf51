"""Results of a run: report, model card, merge, upload, gate."""
