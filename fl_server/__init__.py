"""The coordinator's side: ServerApp, router-aware strategy, rounds and their committed state."""
