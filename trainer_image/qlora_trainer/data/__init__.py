"""From files to token batches: readers, row formats, chat templates, tokenization, collation."""
