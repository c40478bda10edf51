"""Published adapters: loading, chat, serving limits."""
