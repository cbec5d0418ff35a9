"""Scripts that check long runs: kills and resumes, memory growth."""
