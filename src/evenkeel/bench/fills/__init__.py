"""`evenkeel bench fills`: how good answers from backups are."""
