"""Scripts that check long runs: resuming after kills, and memory growth."""
