"""Log records of all processes: format, files, redaction of secrets."""
