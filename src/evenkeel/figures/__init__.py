"""Shows and keeps measurements: estimates, tables, drawings, files."""
