"""The contract between manifest, operator, trainer and command line; it imports pydantic and nothing else of ours."""
