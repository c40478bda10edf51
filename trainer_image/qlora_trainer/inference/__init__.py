"""Published adapters: loading, chat and serving limits."""
