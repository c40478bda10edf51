"""Everything about a result: report, model card, merge, upload, gate."""
