"""What commands print: tables, progress, results."""
